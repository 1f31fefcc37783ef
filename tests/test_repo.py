"The repository is what it says: generated files match their notebooks, notebooks keep to the budget, versions agree."
import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(d.startswith(('.', '_')) for d in p.relative_to(NBS).parts))
LIBRARY = [p for p in NOTEBOOKS if p.parent == NBS and p.name[0].isdigit()]
ANALYSIS = [p for p in NOTEBOOKS if p.parent.name == 'analysis']
TAUGHT = [p for p in NOTEBOOKS if p.parent.name in ('nbs', 'tutorials')] # these are committed with their outputs
LARGE = set() # files that may be over 1 MB, as paths from the root, each with its reason


def name(p): return p.relative_to(NBS).as_posix() if isinstance(p, Path) else None
def cells(p): return json.loads(p.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])
def code(p): return [source(c) for c in cells(p) if c['cell_type'] == 'code' and source(c).strip()]
def exported(s): return bool(re.match(r'\s*#\|\s*exports?\b', s))
def tree(s): return ast.parse('\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in s.splitlines()))
def pyproject(): return tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))
def lines(path): return [s for s in (ROOT/path).read_text(encoding='utf-8').splitlines() if s.strip() and not s.startswith('#')]
def canonical(package): return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', package)[0]).lower()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    "A copy of the project's sources, and the working directory in it."
    to = tmp_path/'project'
    to.mkdir()
    shutil.copy2(ROOT/'pyproject.toml', to)
    for d in ('nbs', 'direction_fusion'):
        shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', '_docs'))
    monkeypatch.chdir(to)
    monkeypatch.delenv('IN_TEST', raising=False)
    return to


def contents(root): return {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for d, ext in
                            [('', 'toml'), ('direction_fusion', 'py'), ('nbs', 'ipynb'), ('nbs', 'txt')]
                            for p in (root/d).glob(f'*.{ext}' if not d else f'**/*.{ext}') if '.ipynb_checkpoints' not in p.parts}

def differing(before, after): return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


# Generated files

def test_export_leaves_no_diff(copy):
    from nbdev.doclinks import nbdev_export
    before = contents(copy)
    for p in (copy/'direction_fusion').glob('**/*.py'):
        if p.name != '__init__.py': p.unlink() # so that a module without a notebook is noticed
    nbdev_export.__wrapped__()
    assert not (d := differing(before, contents(copy))), f"run `make export`: {', '.join(d)}"


def test_clean_leaves_no_diff(copy):
    from nbdev.clean import nbdev_clean
    before = contents(copy)
    nbdev_clean.__wrapped__(str(copy/'nbs'))
    assert not (d := differing(before, contents(copy))), f"run `make export`: {', '.join(d)}"


def test_readme_says_what_its_notebook_says():
    from direction_fusion.site import readme_is_stale
    assert not readme_is_stale(ROOT), 'run `make export`: README.md differs from nbs/index.ipynb'


# Notebooks

def test_there_is_something_to_test():
    assert LIBRARY and {p.stem for p in ANALYSIS} >= {'method', 'compare', 'interference'}


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_budget(path):
    all_cells = [c for c in cells(path) if source(c).strip()]
    n, srcs = len(all_cells), code(path)
    prose, hidden = 1 - len(srcs) / n, sum(s.lstrip().startswith('#| hide') for s in srcs) / len(srcs)
    long = max([s.strip().count('\n') for s in srcs if exported(s)], default=0)
    assert n <= 60, f'{n} cells, 60 at most'
    assert prose >= .3, f'{prose:.0%} of the cells are prose, 30 % at least'
    assert hidden <= .15, f'{hidden:.0%} of the code cells are hidden, 15 % at most'
    assert long <= 40, f'an exported cell has {long} lines, 40 at most'


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_lines_fit(path):
    long = [f'{len(line)}: {line.strip()[:60]} …' for s in code(path) for line in s.splitlines() if len(line) > 130]
    assert not long, '130 characters at most\n' + '\n'.join(long)


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_imports_point_down(path):
    number = {re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(code(p)))[1]: p.name[:2] for p in LIBRARY}
    for node in (n for s in code(path) if exported(s) for n in ast.walk(tree(s))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'relative import of {node.module}'
            assert node.names[0].name != '*', f'star import of {node.module}'
            mods = [node.module]
        else: mods = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for m in (m.split('.')[1] for m in mods if m.startswith('direction_fusion.')):
            assert number[m] < path.name[:2], f'{path.name} imports {m}, which comes later'


@pytest.mark.parametrize('path', [*LIBRARY, *ANALYSIS], ids=name)
def test_imports_stand_alone(path):
    for s in code(path):
        kinds = [isinstance(n, ast.Import | ast.ImportFrom) for n in tree(s).body]
        assert not any(kinds) or all(kinds), f'imports share a cell with other code, which the site build would run:\n{s}'


@pytest.mark.parametrize('path', ANALYSIS, ids=name)
def test_one_parameters_cell_of_literals(path):
    tagged = [source(c) for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells tagged `parameters`'
    for n in ast.parse(tagged[0]).body:
        line = ast.get_source_segment(tagged[0], n)
        assert isinstance(n, ast.AnnAssign) and n.value is not None, f'not `name: type = value`: {line}'
        ast.literal_eval(n.value) # raises where a value is derived
        assert '#' in tagged[0].splitlines()[n.end_lineno - 1][n.end_col_offset:], f'no comment: {line}'


@pytest.mark.parametrize('path', ANALYSIS, ids=name)
def test_analysis_defines_nothing(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.For | ast.While | ast.comprehension
    found = [ast.unparse(n) for s in code(path) for n in ast.walk(tree(s)) if isinstance(n, kinds)]
    assert not found, f'belongs in a module: {found}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_outputs_are_sound(path):
    for c in cells(path):
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', f"{o.get('ename')} in:\n{source(c)}"
            text = ''.join(o.get('text', []))
            assert o.get('name') != 'stderr' or not re.search(r'Warning|Traceback|Error', text), text


@pytest.mark.parametrize('path', TAUGHT, ids=name)
def test_outputs_are_there(path):
    for c in cells(path):
        s = source(c)
        if c['cell_type'] != 'code' or re.search(r'#\|\s*eval:\s*false', s): continue
        calls = [n.value.func for n in tree(s).body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        prints = 'print' in [getattr(f, 'id', '') for f in calls]
        assert c['outputs'] or not prints, f'committed without having been run:\n{s}'


@pytest.mark.parametrize('path', [p for p in ANALYSIS if p.stem != 'method'], ids=name) # which needs a training run
def test_analyses_are_committed_executed(path):
    assert any(o.get('data', {}).keys() & {'image/png', 'text/markdown', 'text/html'} for c in cells(path) for o in c.get('outputs', []))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_no_path_of_one_machine(path):
    text = [source(c) for c in cells(path)]
    for o in (o for c in cells(path) for o in c.get('outputs', [])):
        text += [''.join(o.get('text', []))] + [''.join(v) for k, v in o.get('data', {}).items() if k.startswith(('text/', 'image/svg'))]
    found = re.findall(r'(?<![\w.~])/(?:home|root|work|tmp|Users|mnt|var/folders)/[^\s\'"]*', '\n'.join(text))
    assert not found, found


# Around them

def test_data_packages_are_pinned_by_hash():
    for line in lines('requirements-data.txt'):
        assert re.fullmatch(r'[\w.-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+', line), line


def test_every_dependency_is_pinned():
    for line in (pins := lines('constraints.txt')): assert re.fullmatch(r'[\w.-]+==[\w.+!]+', line), line
    proj, pinned = pyproject()['project'], {canonical(s) for s in pins + lines('requirements-data.txt')}
    wanted = {canonical(s) for s in proj['dependencies'] + proj['optional-dependencies']['dev']}
    assert wanted <= pinned, f'not in constraints.txt: {sorted(wanted - pinned)}'


def test_no_large_file():
    listed = subprocess.run(['git', 'ls-files', '-z', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode: pytest.skip('not a git checkout')
    sizes = {f: os.path.getsize(ROOT/f) for f in listed.stdout.split('\0') if f and (ROOT/f).is_file()}
    large = {f: s for f, s in sizes.items() if s > 1_000_000 and f not in LARGE}
    assert sizes and not large, large


def test_citation_and_versions_agree():
    import direction_fusion
    cite, proj = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')), pyproject()['project']
    assert cite['cff-version'] == '1.2.0' and cite['message'] and cite['authors'] == [{'name': proj['authors'][0]['name']}]
    assert (cite['title'], cite['version']) == (proj['name'], direction_fusion.__version__)
    assert cite['license'] == proj['license'] == 'Apache-2.0'
    license = (ROOT/'LICENSE').read_text(encoding='utf-8')
    assert 'Version 2.0, January 2004' in license and 'END OF TERMS AND CONDITIONS' in license


def test_ci_runs_one_script():
    jobs = yaml.safe_load((ROOT/'.github/workflows/test.yml').read_text(encoding='utf-8'))['jobs']
    assert [s['run'] for j in jobs.values() for s in j['steps'] if 'run' in s] == ['bash .ci/run']
    assert os.access(ROOT/'.ci/run', os.X_OK) and 'make test' in lines('.ci/run')
