"A study on a real SLURM of one node, which this test starts and ends: the same numbers as on this machine, and what goes wrong."
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_study import TINY

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT/'tests'/'slurm'/'cluster.sh'
CLI = [sys.executable, '-c', 'from direction_fusion.cli import main; main()']
PROGRAMS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scancel'
MISSING = [p for p in PROGRAMS if shutil.which(p) is None]
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)} on the PATH "
                                                       "(Debian: apt-get install slurm-wlm munge)")
SETTINGS = TINY.replace('orders = 0\n', 'orders = 0, 1\n').replace('workers = 1\n', 'workers = 2\n') + '''
[least]
tasks = digits:0-1, digits:2-3
methods = soft_soup, opcm
'''


def call(root, *args, env={}):
    env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', COLUMNS='150') | env
    return subprocess.run([*CLI, *args], cwd=root, env=env, capture_output=True, text=True, timeout=900)


def records(root):
    found = {p.relative_to(root/'runs'/'least').parent.as_posix(): json.loads(p.read_text())
             for p in (root/'runs'/'least').glob('*/*/record.json')}
    for r in found.values():
        for part in ('seconds', 'peak_memory'): r.pop(part)
    return found


def make(root):
    root.mkdir()
    (root/'settings.ini').write_text(SETTINGS)
    shutil.copytree(ROOT/'nbs'/'analysis', root/'nbs'/'analysis')
    return root


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "The study on this machine."
    root = make(tmp_path_factory.mktemp('here')/'p')
    done = call(root, 'study', 'least')
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope='module')
def cluster():
    "Environment in which commands reach a SLURM that lives as long as this module's tests."
    folder = tempfile.mkdtemp(prefix='slurm', dir='/tmp') # short: munge's socket is in it
    env = {'SLURM_CONF': f'{folder}/slurm.conf'}
    started = subprocess.run([SCRIPT, 'start', folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        os.environ |= env
        yield env
    finally:
        subprocess.run([SCRIPT, 'stop', folder], timeout=120)
        os.environ.pop('SLURM_CONF', None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='module')
def there(here, cluster, tmp_path_factory):
    "The same study on the cluster, in a folder that shares the base alone."
    root = make(tmp_path_factory.mktemp('there')/'p')
    for p in (here/'runs'/'cache').rglob('*.safetensors'):
        if p.parent.name != 'experts':
            (root/p.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, root/p.relative_to(here))
    done = call(root, 'study', 'least', '--executor', 'slurm', '--slurm', 'partition=short, time=10')
    return root, done


def queued(): return subprocess.run(['squeue', '-h'], capture_output=True, text=True).stdout.split()


def test_script_says_what_it_wants():
    p = subprocess.run([SCRIPT, 'restart', '/tmp/x'], capture_output=True, text=True)
    assert p.returncode == 2 and 'start or stop, not restart' in p.stderr


def test_without_slurm_one_sentence_says_so(tmp_path):
    root = make(tmp_path/'p')
    p = call(root, 'study', 'least', '--executor', 'slurm', env={'PATH': '/nowhere'})
    assert p.returncode == 2 and 'needs sbatch and srun on the PATH' in p.stderr and 'Traceback' not in p.stderr
    p = call(root, 'study', 'least', '--executor', 'slurm', '--slurm', 'queue=x', env={'PATH': '/nowhere'})
    assert p.returncode == 2 and 'must look like partition=short, time=60' in p.stderr


def test_order_free_method_ran_once_and_stands_in(here):
    "Soft Soup ran in order 0 alone; run in the other order after all, it gives what stood in for it."
    from direction_fusion.runner import read_records, stand_ins
    from direction_fusion.study import load_study, run_method
    assert sorted(records(here)) == ['opcm/seed0-order0', 'opcm/seed0-order1', 'soft_soup/seed0-order0']
    found = stand_ins(read_records(here/'runs'/'least'))
    stood = next(r for r in found if 'stand_in' in r.inputs)
    assert (stood.method, stood.order, stood.inputs['stand_in']) == ('soft_soup', 1, 0) and len(found) == 4
    ran = run_method(load_study('least', here), 'soft_soup', {}, 0, 1)
    for part in ('R', 'R_macro'): np.testing.assert_array_equal(getattr(ran, part)[-1], getattr(stood, part)[-1])
    for part in ('experts', 'probe', 'norms', 'cosines'): np.testing.assert_allclose(getattr(ran, part), getattr(stood, part))
    assert ran.tasks == stood.tasks and ran.correct['R'][-1] == stood.correct['R'][-1]
    assert ran.metrics['ACC'] == stood.metrics['ACC'] and np.isnan(stood.metrics['BWT'])


@needs_slurm
def test_cluster_gives_the_same_records(here, there):
    root, done = there
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = records(here), records(root)
    assert ours.keys() == theirs.keys() and all(ours[k] == theirs[k] for k in ours)
    assert list((root/'runs'/'least'/'slurm').glob('*/*_log.out'))
    assert (root/'runs'/'least'/'figures'/'compare.svg').exists() and 'Soft Soup' in done.stdout
    assert (root/'runs'/'least'/'times.csv').read_text().startswith('kind,jobs,seconds,cores\nload,')


@needs_slurm
def test_failures_are_listed_and_the_rest_goes_on(there):
    "One damaged expert: what needs it fails on the cluster, notebooks with their errors are kept."
    root, _ = there
    record = root/'runs'/'least'/'opcm'/'seed0-order1'/'record.json'
    kept = record.read_text()
    record.unlink()
    experts = sorted((root/'runs'/'cache'/'experts').glob('*.safetensors'))
    whole = {p: p.read_bytes() for p in experts}
    for p in experts: p.write_bytes(whole[p][:1000])
    broken = call(root, 'study', 'least', '--executor', 'slurm')
    for p in experts: p.write_bytes(whole[p])
    assert broken.returncode == 1 and 'is no whole expert file; delete it' in broken.stdout, broken.stdout + broken.stderr
    assert 'opcm · seed 0 · order 1' in broken.stdout and 'soft_soup' not in broken.stdout.split('jobs failed')[1]
    assert 'is no whole expert file' in (record.parent/'method.ipynb').read_text()
    record.write_text(kept)


@needs_slurm
def test_ctrl_c_cancels_what_was_sent(there, cluster):
    root, _ = there
    shutil.rmtree(root/'runs'/'least'/'opcm')
    p = subprocess.Popen([*CLI, 'study', 'least', '--executor', 'slurm'], cwd=root, start_new_session=True, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), # a background job may ignore it
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {'COLUMNS': '200'})
    deadline = time.time() + 300
    sent = lambda: list((root/'runs'/'least'/'slurm').glob(f'*-{p.pid}/[0-9]*_submission.sh'))
    while not sent() and p.poll() is None and time.time() < deadline: time.sleep(.05)
    while not queued() and p.poll() is None and time.time() < deadline: time.sleep(.05)
    os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=120)[0]
    assert p.returncode == 130 and 'on the cluster cancelled' in said and 'Traceback' not in said, said
    while queued() and time.time() < deadline: time.sleep(.2)
    assert not queued()


@needs_slurm
def test_killed_and_refused_jobs_are_named(there, cluster, tmp_path):
    "A process that dies says nothing; SLURM no longer lists it, and its log is quoted. A partition that is not there is refused."
    from direction_fusion.cluster import Cluster, slurm_options
    c = Cluster(tmp_path, slurm_options('time=5'), width=1, pause=.3) # minutes: a warning comes 90 s before the end
    dead, = c.submit(os._exit, [(3,)], [False])
    deadline = time.time() + 300
    while not dead.done() and time.time() < deadline: time.sleep(.1)
    with pytest.raises(RuntimeError, match='ended without an outcome: .*[Ee]xit'): dead.result()
    with pytest.raises(ValueError, match='SLURM takes no such job: .*nvalid partition'):
        Cluster(tmp_path, slurm_options('partition=nowhere')).submit(abs, [(1,)], [False])
