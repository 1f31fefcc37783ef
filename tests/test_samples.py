"Every sample of the pages runs: commands in this process, in an empty folder, one page after the other as a reader copies them."
import ast
import builtins
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(d.startswith(('.', '_')) for d in p.relative_to(NBS).parts))
PAGES = [*NOTEBOOKS, ROOT/'CONTRIBUTING.md']
FENCE = re.compile(r'^( *)```[ ]*(\w*)[^\n]*\n(.*?)^\1```', re.M | re.S)

# What is not run here: the beginning of the command, why, and what runs it instead.
ELSEWHERE = [
    ('make ', 'installs, trains for minutes, or runs this very test', '.ci/run: make test'),
    ('. .venv/bin/activate', 'comes after `make setup`', '.ci/run: make test'),
    ('pip install ', 'needs a package index', 'Makefile: .[dev]'),
    ('direction-fusion study mine', 'starts processes', 'tests/test_study.py: test_resumed_study_ends_with_figures_and_table'),
    ('direction-fusion study text --executor slurm', 'needs a cluster', 'tests/test_slurm.py: test_cluster_gives_the_same_records'),
    ('direction-fusion study quick --tracking', 'starts processes', 'tests/test_tracking.py: test_trackio_keeps_the_same_on_this_machine'),
    ('papermill nbs/analysis/method.ipynb', 'starts a kernel', 'tests/test_study.py: test_papermill_by_hand_makes_the_same_record'),
    ('trackio show', 'serves a page until it is stopped', 'tests/test_tracking.py: test_trackio_keeps_the_same_on_this_machine'),
    ('wandb sync', 'sends to another host', 'tests/test_tracking.py: test_wandb_offline_gets_curves_accuracies_figures_and_record'),
    ('.venv/bin/nbdev-install-hooks', 'changes the settings of git', ''),
    ('.venv/bin/jupyter lab', 'serves until it is stopped', ''),
    ('python -m direction_fusion.benchmarks', 'measures for minutes, beside other environments', 'nbs/19_benchmarks.ipynb: measure'),
]


def name(p): return p.relative_to(ROOT).as_posix()


def samples(path): # (language, text) of each fenced block, in the order of the page
    text = path.read_text(encoding='utf-8')
    prose = [text] if path.suffix == '.md' else [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown']
    return [(m[2], m[3]) for s in prose for m in FENCE.finditer(s)]


def commands(text): # of a shell: one a line, or a Python program between `<<'END'` and END
    lines = iter(text.splitlines())
    for line in lines:
        if m := re.match(r"python - <<'(\w+)'$", line):
            yield ['python', '-c', '\n'.join(iter(lambda: next(lines), m[1]))]
        elif words := shlex.split(line, comments=True): yield words


def elsewhere(words): return next((e for e in ELSEWHERE if ' '.join(words).startswith(e[0].strip())), None)


def call(words): # what the command prints
    from direction_fusion.cli import app
    said = io.StringIO()
    with redirect_stdout(said):
        if words[0] == 'direction-fusion': app(words[1:], standalone_mode=False)
        elif words[:2] == ['python', '-c']: exec(compile(words[2], 'sample', 'exec'), {'__name__': '__main__'})
        else: raise AssertionError(f'neither run here nor in the list of what runs elsewhere: {shlex.join(words)}')
    return said.getvalue()


def understood(words): # the command line knows its arguments, though it is not started
    from typer.main import get_command
    if words[0] == 'make':
        known = re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M)
        assert not (odd := {w for w in words[1:] if '=' not in w} - set(known)), f'no such target: {odd}'
    if words[0] != 'direction-fusion': return
    group = get_command(__import__('direction_fusion.cli').cli.app)
    sub, command, rest = group.resolve_command(group.make_context('direction-fusion', words[1:], resilient_parsing=True), words[1:])
    command.make_context(sub, list(rest))


def configured(text, here): # a section of `settings.ini`, on data that is made up here, or lines of one
    from direction_fusion.study import load_study
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8').partition('\n[text]')[0]
    alone = not re.search(r'^\[', text, re.M)
    extra = '\n[sample]\ntasks = rt, trec\n' + text if alone else '\n' + text
    (here/'settings.ini').write_text(settings + extra, encoding='utf-8')
    study = load_study('sample' if alone else re.findall(r'^\[(\w+)\]', text, re.M)[0], here)
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition('='))
        if key and hasattr(study, key) and isinstance(getattr(study, key), str): assert getattr(study, key) == value
    return study


def write(lang, text, here):
    if lang == 'yaml': # our recipes and mergekit's
        from direction_fusion.recipes import read_recipe
        (here/'recipe.yaml').write_text(text, encoding='utf-8')
        read_recipe(here/'recipe.yaml')
    elif lang == 'toml': tomllib.loads(text)
    elif lang == 'ini': configured(text, here)
    else: raise AssertionError(f'what is a sample in {lang!r}?')


def follow(path, here): # copies every sample of a page, from top to bottom; how many there were
    ran = 0
    for lang, text in samples(path):
        if lang not in ('sh', 'bash', 'console', ''): write(lang, text, here)
        for words in commands(text) if lang in ('sh', 'bash', 'console', '') else []:
            if elsewhere(words): understood(words)
            else: call(words)
        ran += 1
    return ran


@pytest.mark.parametrize('path', [p for p in PAGES if samples(p) and p.name != 'index.ipynb'], ids=name)
def test_samples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert follow(path, tmp_path)


def test_home_leads_to_a_fused_model(tmp_path, monkeypatch):
    "Whoever copies the commands of the home page has models of their own in the end, all of them different, and all of them whole."
    import torch
    from safetensors.torch import load_file
    monkeypatch.chdir(tmp_path)
    assert follow(NBS/'index.ipynb', tmp_path) > 5
    call(shlex.split('direction-fusion fuse base expert2 --out one'))
    made = {d: load_file(tmp_path/d/'model.safetensors') for d in ('base', 'expert1', 'expert2', 'fused', 'from-recipe', 'alive', 'one')}
    k = next(k for k, v in made['base'].items() if v.ndim == 2 and 'attention' in k)
    tau = {d: m[k] - made['base'][k] for d, m in made.items()}
    torch.testing.assert_close(tau['from-recipe'], .5 * (tau['expert1'] + tau['expert2']), rtol=1e-3, atol=1e-6) # as the recipe says
    torch.testing.assert_close(tau['alive'], tau['one'], rtol=1e-3, atol=1e-5) # expert1 has left
    assert 0 < tau['fused'].norm() < tau['expert1'].norm() + tau['expert2'].norm() and not torch.equal(tau['fused'], tau['alive'])
    assert 'dora' in (tmp_path/'fused/README.md').read_text(encoding='utf-8')


def test_own_task_of_the_home_page_is_studied(tmp_path, monkeypatch):
    "The section that the home page shows, as it is, on a table and an encoder that are made up here."
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from direction_fusion.study import run_method
    monkeypatch.chdir(tmp_path)
    kinds = {'billing': 'invoice refund charge', 'repair': 'broken noise leak'}
    rows = [f'"{w} number {i} {k}",{k}' for k, ws in kinds.items() for i in range(20) for w in ws.split()]
    (tmp_path/'data').mkdir()
    (tmp_path/'data/tickets.csv').write_text('\n'.join(['body,queue', *rows]), encoding='utf-8')
    words = sorted({w for r in rows for w in re.findall('[a-z]+', r)})
    (tmp_path/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]), encoding='utf-8')
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertTokenizerFast(vocab='vocab.txt').save_pretrained('path/to/an/encoder')
    BertModel(BertConfig(vocab_size=len(words) + 5, **size)).save_pretrained('path/to/an/encoder')
    text = next(t for lang, t in samples(NBS/'index.ipynb') if lang == 'ini')
    study = configured(text + 'train_size = 60\nval_size = 20\ntest_size = 20\nepochs = 1\n', tmp_path)
    record = run_method(study, 'dora')
    assert record.tasks == ['tickets', 'rt', 'trec'] and 0 <= record.metrics['ACC'] <= 1


def test_what_runs_elsewhere_does():
    unused = [e[0] for e in ELSEWHERE]
    for words in (w for p in PAGES for lang, t in samples(p) if lang in ('sh', 'bash', '') for w in commands(t)):
        if (e := elsewhere(words)) and e[0] in unused: unused.remove(e[0])
    assert not unused, f'no page has it any more: {unused}'
    for _, why, where in ELSEWHERE:
        file, _, what = where.partition(': ')
        assert why and (not file or what in (ROOT/file).read_text(encoding='utf-8')), f'{where} is gone'
    tools = ['papermill', 'nbdev-install-hooks', 'jupyter', 'direction-fusion']
    assert not (lost := [t for t in tools if not shutil.which(t, path=Path(sys.executable).parent)]), f'not installed by `make setup`: {lost}'


# What a reader copies from a tutorial must not need what the page hides.

@pytest.mark.parametrize('path', [*sorted(NBS.glob('tutorials/*.ipynb')), *(NBS/f'{n}.ipynb' for n in ('index', 'choose', 'explore'))], ids=name)
def test_visible_cells_need_no_hidden_one(path):
    known, lost = set(dir(builtins)), {}
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        s = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.match(r'#\| *(hide|echo: false)', s): continue
        nodes = list(ast.walk(ast.parse(s)))
        for n in nodes:
            if isinstance(n, ast.FunctionDef | ast.ClassDef): known.add(n.name)
            elif isinstance(n, ast.arg): known.add(n.arg)
            elif isinstance(n, ast.alias): known.add((n.asname or n.name).split('.')[0])
            elif isinstance(n, ast.ExceptHandler) and n.name: known.add(n.name)
            elif isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load): known.add(n.id)
        for n in nodes:
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id not in known: lost[n.id] = s.splitlines()[-1]
    assert not lost, f'used where a reader sees it, defined where nobody does: {lost}'
