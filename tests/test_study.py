"The smallest study end to end through the command line: results, resumption, repetition, and what a user sees after a mistake."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, '-c', 'from direction_fusion.cli import main; main()']
SETTINGS = '''
[mini]
tasks = digits:0-1, digits:2-3, digits:4-5
epochs = 2
methods = soft_soup, dora, sequential
'''


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A folder with a study of its own, the analysis notebooks, and the package's caches out of reach."
    root = tmp_path_factory.mktemp('project')
    default, quick = ((ROOT/'settings.ini').read_text() + '\n[').split('[quick]')
    quick = ''.join(line + '\n' for line in quick.split('\n[')[0].splitlines()
                    if not line.startswith(('tasks', 'epochs', 'methods')))
    head = default.split('\n[text]')[0]
    mini = SETTINGS.replace('[mini]', '[mini]' + quick)
    mine = '\n[task:mine]\npath = mine.csv\ntext = body\nlabel = queue\n\n[own]\nmodel = no_model\ntasks = mine\n'
    small = '\ntasks = digits:0-1\ntrain_size = 60\nval_size = 20\ntest_size = 20\n'
    mine += f'\n[hub]\nmodel = someone/some-model{small}\n[cut]\nmodel = cut_off{small}'
    (root/'settings.ini').write_text(head + '\n' + mini + mine)
    shutil.copytree(ROOT/'nbs'/'analysis', root/'nbs'/'analysis')
    return root


def call(root, *args, env={}):
    env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', COLUMNS='150') | env
    return subprocess.run([*CLI, *args], cwd=root, env=env, capture_output=True, text=True, timeout=600)


def record(root, method): return json.loads((root/'runs'/'mini'/method/'seed0-order0'/'record.json').read_text())


def times(root):
    return {p: p.stat().st_mtime_ns for p in (root/'runs').rglob('*')
            if p.suffix in ('.safetensors', '.npy') or p.name == 'record.json'}


@pytest.fixture(scope='module')
def finished(project):
    "The study, broken off by Ctrl-C after its first expert, and run again to its end."
    env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    p = subprocess.Popen([*CLI, 'study', 'mini'], cwd=project, env=env, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), # a background job may ignore it
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 300
    experts = lambda: list((project/'runs').glob('cache/experts/*.safetensors'))
    while len(experts()) < 2 and p.poll() is None and time.time() < deadline: time.sleep(.05)
    assert p.poll() is None, f'ended before it could be broken off:\n{p.communicate()[0]}'
    os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=60)[0]
    before = times(project)
    done = call(project, 'study', 'mini')
    return p.returncode, said, before, done


def test_interrupted_study_says_how_to_go_on(finished):
    code, said, before, _ = finished
    assert code == 130 and 'the same command goes on from here' in said and 'Traceback' not in said
    assert before


def test_resumed_study_ends_with_figures_and_table(project, finished):
    *_, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    figures = project/'runs'/'mini'/'figures'
    for name in ('compare.svg', 'compare.png', 'differences.svg', 'significance.svg', 'learning_curves.svg', 'retention.svg',
                 'cosines.svg', 'interference.svg', 'summary.csv', 'summary.md', 'differences.csv'):
        assert (figures/name).stat().st_size > 100, name
    assert 'Soft Soup' in done.stdout and 'Sequential fine-tuning' in done.stdout


def test_nothing_finished_is_done_again(project, finished):
    _, _, before, _ = finished
    now = times(project)
    assert all(now[p] == t for p, t in before.items())
    again = call(project, 'study', 'mini')
    assert again.returncode == 0, again.stderr
    assert times(project) == now


def test_record_holds_the_whole_run(project, finished):
    r = record(project, 'dora')
    R = np.array(r['R'], dtype=float)
    assert R.shape == (3, 3) and np.isnan(R[np.triu_indices(3, 1)]).all() and (R[np.tril_indices(3)] >= 0).all()
    assert r['tasks'] == ['digits:0-1', 'digits:2-3', 'digits:4-5']
    assert r['seed'] == 0 and r['params'].keys() == {'p', 'rho', 'lam', 'ceiling'}
    assert set(r['inputs']) == {'base', 'tasks', 'experts', 'recipe', 'stored'} and r['inputs']['stored'] > 0 and r['versions']['torch'] and r['seconds']['total'] > 0


def test_record_keeps_single_answers(project, finished):
    "The matrix, the experts' level and the probe's are means of what is kept bit by bit."
    from direction_fusion.metrics import unpack_bits
    r = record(project, 'dora')
    mean = lambda text, n: unpack_bits(text, n).mean()
    n, hits = r['correct']['n'], r['correct']['R']
    assert all(mean(hits[i][j], n[j]) == r['R'][i][j] for i in range(3) for j in range(i + 1))
    assert all(hits[i][j] is None for i in range(3) for j in range(i + 1, 3))
    for level in ('experts', 'probe'): assert [mean(x, k) for x, k in zip(r['correct'][level], n)] == r[level]


def test_methods_that_measure_run_like_any_other(project, finished):
    "RegMean and Fisher merging: statistics of training inputs without labels, kept beside the experts; the record counts them."
    done = call(project, 'study', 'mini', '--methods', 'regmean,fisher')
    assert done.returncode == 0, done.stdout + done.stderr
    for method, kind in (('regmean', 'covariance'), ('fisher', 'fisher')):
        r = record(project, method)
        assert r['inputs']['statistics'] == dict(kind=kind, part='train', labels=False, examples={t: 64 for t in r['tasks']})
        assert r['R'][0][0] == r['experts'][0]              # one expert is left as it is
    kept = list((project/'runs'/'cache'/'statistics').glob('*.safetensors'))
    assert len(kept) == 2 * 3                               # two kinds, three experts
    assert not list((project/'runs').rglob('.part-*'))


def test_orders_share_what_does_not_depend_on_them(project, finished):
    "A method that is free of order ends in every order with the same model: merged and evaluated once."
    from direction_fusion.study import load_study, task_order
    study = load_study('mini', project)
    other = next(o for o in range(1, 20) if set(task_order(study, o)[:2]) == set(task_order(study, 0)[:2])
                 and task_order(study, o) != task_order(study, 0))
    merged = lambda: len(list((project/'runs'/'cache'/'fused').glob('*.json')))
    before = merged()
    assert call(project, 'study', 'mini', '--methods', 'soft_soup', '--orders', str(other)).returncode == 0
    assert merged() == before + 1                           # its first task alone; both pairs and all three were there
    a = record(project, 'soft_soup')
    b = json.loads((project/'runs'/'mini'/'soft_soup'/f'seed0-order{other}'/'record.json').read_text())
    assert dict(zip(b['tasks'], b['R'][-1])) == dict(zip(a['tasks'], a['R'][-1])) and b['tasks'] != a['tasks']


def test_what_is_published_shows_every_method(project, finished):
    "Figures and tables that a run of some methods drew last are drawn anew."
    assert call(project, 'study', 'mini', '--methods', 'dora').returncode == 0
    done = call(project, 'publish', 'mini')
    assert done.returncode == 0, done.stderr
    kept = (project/'assets'/'mini'/'summary.csv').read_text()
    assert all(title in kept for title in ('Soft Soup', 'DoRA', 'Sequential fine-tuning'))


def test_same_seed_gives_the_same_matrix(project, finished, tmp_path):
    "All over again in another folder: training, fusion and evaluation give the same numbers."
    shutil.copytree(project, tmp_path/'p', ignore=shutil.ignore_patterns('runs'))
    assert call(tmp_path/'p', 'study', 'mini').returncode == 0
    for m in ('soft_soup', 'dora', 'sequential'):
        a, b = record(project, m), record(tmp_path/'p', m)
        for part in ('seconds', 'peak_memory'): a.pop(part), b.pop(part)
        assert a == b


def test_papermill_by_hand_makes_the_same_record(project, finished):
    "`papermill nbs/analysis/method.ipynb out.ipynb -p method …` in a kernel of its own."
    env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    args = ['-p', 'study', 'mini', '-p', 'method', 'soft_soup', '-p', 'out', 'runs/by_hand/x',
            '--log-level', 'ERROR', '--no-progress-bar']
    p = subprocess.run([sys.executable, '-m', 'papermill', 'nbs/analysis/method.ipynb', 'out.ipynb', *args],
                       cwd=project, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert json.loads((project/'runs/by_hand/x/record.json').read_text())['R'] == record(project, 'soft_soup')['R']


def test_unknown_notebook_parameter_is_refused(project):
    from direction_fusion.runner import run_notebook
    says = "method.ipynb has no parameter 'metod'; it takes study, method, params, seed, order, evaluate, out"
    with pytest.raises(ValueError, match=says):
        run_notebook(project, 'method', project/'never.ipynb', dict(metod='dora'))
    assert not (project/'never.ipynb').exists()


def test_failed_job_is_listed_and_the_rest_goes_on(project, finished):
    "A damaged expert: its methods fail and are named; nothing else is lost."
    record_file = project/'runs'/'mini'/'dora'/'seed0-order0'/'record.json'
    kept = record_file.read_text()
    record_file.write_text(kept[:50])                       # cut off: made anew, from the cache
    assert call(project, 'study', 'mini', '--methods', 'dora').returncode == 0
    a, b = json.loads(kept), record(project, 'dora')
    assert a['R'] == b['R']
    experts = sorted((project/'runs'/'cache'/'experts').glob('*.safetensors'))
    whole = {p: p.read_bytes() for p in experts}
    for p in experts: p.write_bytes(whole[p][:1000])
    record_file.unlink()
    broken = call(project, 'study', 'mini', '--methods', 'dora')
    for p in experts: p.write_bytes(whole[p])
    assert broken.returncode == 1 and 'jobs failed' in broken.stdout and 'is no whole expert file; delete it' in broken.stdout
    assert call(project, 'study', 'mini', '--methods', 'dora').returncode == 0


@pytest.mark.parametrize('args, says', [
    (('study', 'nope'), "unknown study 'nope'; settings.ini has mini, own, hub, cut"),
    (('study', 'mini', '--methods', 'doro'), "unknown method 'doro'; did you mean 'dora'?"),
    (('study', 'mini', '--methods', 'dora(rho=-1)'), '`rho` of dora must be in [0, inf], got -1'),
    (('study', 'mini', '--seeds', 'x'), '`--seeds` must be integers'),
    (('publish', 'own'), "run: direction-fusion study own"),
])
def test_mistakes_end_in_one_sentence(project, args, says):
    p = call(project, *args)
    assert p.returncode == 2 and says in p.stderr and 'Traceback' not in p.stderr + p.stdout
    assert len(p.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('csv, says', [
    (None, 'mine.csv'),
    ('text,queue\na,b\n', 'body'),
    ('body,queue\n' + ''.join(f'text {i},\n' for i in range(300)), 'queue'),
])
def test_own_files_with_mistakes(project, csv, says):
    f = project/'mine.csv'
    f.unlink(missing_ok=True)
    if csv: f.write_text(csv)
    p = call(project, 'study', 'own', '--methods', 'soft_soup')
    out = p.stdout + p.stderr
    assert p.returncode == 2 and says in out and 'Traceback' not in out
    assert not (project/'runs'/'own').exists()              # before any work

def test_model_folder_without_weights(project):
    (project/'no_model').mkdir(exist_ok=True)
    rows = ''.join(f'text {i},{"ab"[i % 2]}\n' for i in range(1000))
    (project/'mine.csv').write_text('body,queue\n' + rows)
    p = call(project, 'study', 'own', '--methods', 'soft_soup')
    out = p.stdout + p.stderr
    assert p.returncode == 2 and 'is no model folder: it has no config.json' in out and 'Traceback' not in out


def test_hub_model_without_network_fails_once(project):
    p = call(project, 'study', 'hub', '--methods', 'soft_soup', env={'HF_HUB_OFFLINE': '1'})
    assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1 and 'Traceback' not in p.stdout
    assert "cannot load model 'someone/some-model'" in p.stderr and 'looked up on the hub, which needs a network' in p.stderr
    assert not (project/'runs'/'hub').exists()              # before any work


def test_model_that_is_cut_off_fails_once(project):
    (project/'cut_off').mkdir(exist_ok=True)
    (project/'cut_off'/'config.json').write_text('{}')
    (project/'cut_off'/'model.safetensors').write_bytes(b'x' * 20)
    p = call(project, 'study', 'cut', '--methods', 'soft_soup')
    assert p.returncode == 2 and 'cut_off: model.safetensors is no whole safetensors file' in p.stderr
    assert not (project/'runs'/'cut').exists()
