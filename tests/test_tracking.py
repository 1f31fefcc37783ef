"Tracking for real and without a network: wandb offline, trackio's local database, and a tracker that fails."
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_study import TINY

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, '-c', 'from direction_fusion.cli import main; main()']
SETTINGS = TINY + '''
[least]
tasks = digits:0-1, digits:2-3
methods = soft_soup
'''


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None,
                              reason=f"{package} is not installed (pip install 'direction_fusion[tracking]')")


def call(root, *args, env={}):
    "The command, with no key of a tracker in reach."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('WANDB', 'TRACKIO'))}
    env = clean | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', COLUMNS='150', NETRC='/nowhere') | env
    return subprocess.run([*CLI, *args], cwd=root, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A function (name) → folder of a study that has nothing yet but the base."
    first = tmp_path_factory.mktemp('base')/'p'
    first.mkdir()
    (first/'settings.ini').write_text(SETTINGS)
    shutil.copytree(ROOT/'nbs'/'analysis', first/'nbs'/'analysis')
    from direction_fusion.train import pretrained_vit
    pretrained_vit(first/'runs'/'cache')

    def copy(name):
        to = tmp_path_factory.mktemp(name)/'p'
        shutil.copytree(first, to)
        return to
    return copy


def record(root): return json.loads((root/'runs'/'least'/'soft_soup'/'seed0-order0'/'record.json').read_text())


def wandb_runs(folder):
    "Name → what an offline run logged, read from its file as `wandb sync` reads it."
    from wandb.proto import wandb_internal_pb2 as pb
    from wandb.sdk.internal.datastore import DataStore
    found = {}
    for file in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
        store, steps, name, artifacts = DataStore(), [], '', []
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            r = pb.Record.FromString(data)
            if r.HasField('run'): name = r.run.display_name
            if r.HasField('history'):
                steps.append({i.key or '.'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item})
            if r.HasField('request') and r.request.HasField('log_artifact'): artifacts.append(r.request.log_artifact.artifact)
            if r.HasField('artifact'): artifacts.append(r.artifact)
        assert name not in found, f'two runs called {name}'
        found[name] = steps, artifacts, file.parent
    return found


@needs('wandb')
def test_wandb_offline_gets_curves_accuracies_figures_and_record(start):
    root = start('wandb')
    done = call(root, 'study', 'least', '--tracking', 'wandb')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'not tracked' not in done.stderr
    found = wandb_runs(root/'runs'/'least'/'tracking')
    assert sorted(found) == ['compare', 'digits:0-1 seed 0', 'digits:2-3 seed 0', 'interference', 'soft_soup seed 0 order 0']
    drawn = {re.match('[a-z_]+[a-z]', p.name)[0] for n in ('compare', 'interference') for p in found[n][2].rglob('*.png')}
    assert drawn == {p.stem for p in (root/'runs'/'least'/'figures').glob('*.png')} and 'compare' in drawn
    for task in ('digits:0-1', 'digits:2-3'):
        curve = [s['train/loss'] for s in found[f'{task} seed 0'][0] if 'train/loss' in s]
        assert len(curve) >= 8 and curve[-1] < curve[0]
    steps, artifacts, folder = found['soft_soup seed 0 order 0']
    r = record(root)
    rows = [s for s in steps if 'mean accuracy' in s]
    assert [s[f'accuracy/{r["tasks"][0]}'] for s in rows] == [row[0] for row in r['R']]
    assert next(s['metrics/ACC'] for s in steps if 'metrics/ACC' in s) == r['metrics']['ACC']
    images = sorted(p.name for p in folder.rglob('*.png'))
    assert [re.match('[a-z_]+[a-z]', n)[0] for n in images] == ['accuracy_matrix', 'forgetting', 'interference']
    assert [(a.name, a.type, [e.path for e in a.manifest.contents]) for a in artifacts] == [
        ('least-soft_soup_seed_0_order_0', 'record', ['record.json'])]


@needs('trackio')
def test_trackio_keeps_the_same_on_this_machine(start):
    root = start('trackio')
    done = call(root, 'study', 'least', '--tracking', 'trackio')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'not tracked' not in done.stderr
    folder = root/'runs'/'least'/'tracking'
    with sqlite3.connect(folder/'least.db') as db:
        rows = [(name, json.loads(x)) for name, x in db.execute('select run_name, metrics from metrics order by id')]
    by = {n: [x for m, x in rows if m == n] for n, _ in rows}
    assert sorted(by) == ['compare', 'digits:0-1 seed 0', 'digits:2-3 seed 0', 'interference', 'soft_soup seed 0 order 0']
    curve = [x['train/loss'] for x in by['digits:0-1 seed 0'] if 'train/loss' in x]
    assert len(curve) >= 8 and curve[-1] < curve[0]
    last = by['soft_soup seed 0 order 0'][-1]
    assert last['metrics/ACC'] == record(root)['metrics']['ACC']
    assert {k for k in last if k.startswith('figures/')} == {f'figures/{n}' for n in ('accuracy_matrix', 'forgetting', 'interference')}
    assert len(list(folder.rglob('*.png'))) == 3 + len(list((root/'runs'/'least'/'figures').glob('*.png')))


def test_a_tracker_that_fails_loses_nothing(start, tmp_path):
    "A wandb that refuses everything: experts are trained, the record is written, the failure is said once a job."
    (tmp_path/'wandb.py').write_text("__version__ = '9.9'\nrun = None\ndef init(*a, **k): raise RuntimeError('disk quota exceeded')\n")
    root = start('broken')
    done = call(root, 'study', 'least', '--tracking', 'wandb', env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    said = ' '.join(done.stderr.split())
    for job in ('expert digits:0-1 · seed 0', 'expert digits:2-3 · seed 0', 'soft_soup · seed 0 · order 0'):
        assert f'{job}: not tracked by wandb: ' in said, said
    assert 'disk quota exceeded' in said
    assert record(root)['metrics']['ACC'] > 0
    assert (root/'runs'/'least'/'figures'/'compare.svg').exists()


def test_unknown_tracker_is_refused(start):
    p = call(start('unknown'), 'study', 'least', '--tracking', 'mlflow')
    assert p.returncode == 2 and '`tracking` must be one of none, wandb, trackio' in p.stderr
