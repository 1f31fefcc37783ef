"What may come from a disk: cut off, changed, unreadable, full. Nothing but `ValueError` and `OSError` may leave the reader."
import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import save_file
from test_checkpoints import call

from direction_fusion.checkpoints import open_checkpoint
from direction_fusion.streaming import fuse_checkpoints
from direction_fusion.writing import ShardWriter

STATE = {'a.weight': torch.arange(12.).view(3, 4), 'a.bias': torch.ones(3).bfloat16(), 'n': torch.tensor(7)}
PLAN = {k: (x.dtype, tuple(x.shape)) for k, x in STATE.items()}


def opens(path):
    "True if the file opens and gives tensors of the shapes it announces; False if it is refused."
    try: ck = open_checkpoint(path)
    except (ValueError, OSError) as e:
        assert path.name in str(e) and '\n' not in str(e), e
        return False
    for k, m in ck.meta.items(): assert ck[k].shape == torch.Size(m.shape) and ck[k].dtype == m.dtype and len(ck.digest(k)) == 32
    return True


@pytest.mark.parametrize('ext', ['safetensors', 'bin', 'old.bin'])
def test_every_truncation_is_refused(tmp_path, ext):
    file = tmp_path/f'model.{ext}'
    if ext == 'safetensors': save_file(STATE, file)
    else: torch.save(STATE, file, _use_new_zipfile_serialization=ext == 'bin')
    whole = file.read_bytes()
    assert opens(file)
    for n in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        file.write_bytes(whole[:n])
        assert not opens(file), f'{n} of {len(whole)} bytes'


@pytest.mark.parametrize('ext', ['safetensors', 'bin', 'old.bin'])
def test_changed_bytes_never_surprise(tmp_path, ext):
    file, rng = tmp_path/f'model.{ext}', random.Random(0)
    if ext == 'safetensors': save_file(STATE, file)
    else: torch.save(STATE, file, _use_new_zipfile_serialization=ext == 'bin')
    whole, refused = file.read_bytes(), 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])): changed[rng.randrange(min(len(whole), 600))] = rng.randrange(256)
        file.unlink()
        file.write_bytes(changed)
        refused += not opens(file)
    assert refused > 100


@pytest.mark.parametrize('header', [
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}, {'a': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [0, 8]}},
    {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4, 8]}}, {'a': {'dtype': 'F32', 'shape': [2]}}, {'a': []}, [], {'a': None},
    {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}, 'b': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}},
    {'a': {'dtype': 'F32', 'shape': [2**40, 2**40], 'data_offsets': [0, 8]}}, {}, {'__metadata__': {'format': 'pt'}}])
def test_headers_that_lie_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path/'lie.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + bytes(8 if header and 'a' in header else 0))
    assert not opens(tmp_path/'lie.safetensors')


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin', 'config.json'])
def test_a_file_without_the_right_to_read_it(name):
    folder = Path(mkdtemp()) # pytest's own folders are closed to other users
    save_file(STATE, folder/('model.safetensors' if name == 'config.json' else name))
    (folder/'config.json').write_text('{}')
    (folder/name).chmod(0)
    folder.chmod(0o755)
    uid = os.geteuid()
    if not uid: os.seteuid(65534) # root may read everything
    try:
        with pytest.raises(OSError, match=name): open_checkpoint(folder)
    finally:
        os.seteuid(uid)
        rmtree(folder)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path/'model.safetensors').mkdir()
    with pytest.raises(OSError, match=r'model\.safetensors cannot be read'): open_checkpoint(tmp_path)


def test_only_data_is_fetched_from_the_hub(tmp_path, monkeypatch):
    from fnmatch import fnmatch
    repo = ['config.json', 'tokenizer.model', 'merges.txt', 'modeling.py', 'train.sh', 'pytorch_model.bin', 'optimizer.bin',
            'pytorch_model-00001-of-00001.bin', 'onnx/model.safetensors', 'model.onnx']
    fetched = []
    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        fetched.extend(f for f in repo if any(fnmatch(f, p) for p in allow_patterns) and not fnmatch(f, ignore_patterns))
        (tmp_path/'config.json').write_text('{}')
        if 'pytorch_model.bin' in fetched: torch.save(STATE, tmp_path/'pytorch_model.bin')
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    assert list(open_checkpoint('someone/tiny')) == list(STATE)
    assert set(fetched) == {'config.json', 'tokenizer.model', 'merges.txt', 'pytorch_model.bin', 'pytorch_model-00001-of-00001.bin'}


def test_reading_takes_no_memory_of_its_own(tmp_path):
    save_file({f'w{i}': torch.ones(1 << 20) for i in range(32)}, tmp_path/'large.safetensors') # 128 MiB
    code = f'''
import resource
from direction_fusion.checkpoints import open_checkpoint
from direction_fusion.streaming import fuse_checkpoints
def anonymous(): return sum(int(s.split()[1]) for s in open('/proc/self/smaps_rollup') if s.startswith('Anonymous:')) / 1024
ck = open_checkpoint({str(tmp_path/'large.safetensors')!r})
ck['w0'].sum(), ck.digest('w0')
before = anonymous()
keep = [(ck[k], ck[k].sum().item(), ck.digest(k)) for k in ck]
print(anonymous() - before)
'''
    if not os.path.exists('/proc/self/smaps_rollup'): pytest.skip('needs Linux')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16, f'{out} MiB'


def write(out, state=STATE, **kw):
    with ShardWriter(out, {k: (x.dtype, tuple(x.shape)) for k, x in state.items()}, **kw) as w:
        for k, x in state.items():
            w.write(k, 0, x.reshape(-1, *x.shape[1:]) if x.ndim else x.reshape(1))
            w.finish(k)


def test_many_runs_into_one_folder(tmp_path):
    "Exactly one of several runs wins, and what it wrote is whole. (A lock holds between two openings of one process as well.)"
    def race(args):
        out, seed = args
        try: write(out, {k: x + seed for k, x in STATE.items()})
        except (ValueError, OSError) as e: return str(e)
        return seed
    with ThreadPoolExecutor(8) as pool:
        for i in range(40):
            got = list(pool.map(race, [(tmp_path/f'out{i}', s) for s in range(8)]))
            won = [s for s in got if isinstance(s, int)]
            assert len(won) == 1 and all('another run' in s or 'exists' in s for s in got if isinstance(s, str)), got
            ck = open_checkpoint(tmp_path/f'out{i}')
            for k, x in STATE.items(): assert torch.equal(ck[k], x + won[0])
    assert sorted(os.listdir(tmp_path)) == sorted(f'out{i}' for i in range(40))


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_a_disk_that_is_full(tmp_path):
    small = tmp_path/'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small], capture_output=True, check=False).returncode:
        pytest.skip('no right to mount')
    try:
        with pytest.raises(OSError, match="no room for 'out'"): write(small/'out', {'w': torch.zeros(1 << 19)})
        assert os.listdir(small) == []
        write(small/'out', {'w': torch.zeros(1 << 17)})
        assert os.listdir(small) == ['out']
    finally: subprocess.run(['umount', small], check=True)


# The commands: one line with culprit and remedy, and nothing left behind

SHARDS = {'model-00001-of-00002.safetensors': ('h.0.weight', 'h.0.bias'),
          'model-00002-of-00002.safetensors': ('h.1.weight', 'h.1.bias')}
NAMES = [k for ks in SHARDS.values() for k in ks]


def toy(seed): # parameters of two layers
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn((6, 4) if 'weight' in k else (6,), generator=g) for k in NAMES}


def model(folder, state, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder/'model.safetensors', {'format': 'pt'})
    (folder/'config.json').write_text(json.dumps({'model_type': 'toy', 'num_heads': 2}) if config is None else config)
    return folder


def sharded(folder, where=None, lose=(), twice=()): # `where`: text of the index
    model(folder, toy(1))
    (folder/'model.safetensors').unlink()
    for f, ks in SHARDS.items():
        save_file({k: v for k, v in toy(1).items() if (k in ks or k in twice) and k not in lose}, folder/f)
    index = json.dumps({'weight_map': {k: f for f, ks in SHARDS.items() for k in ks}})
    (folder/'model.safetensors.index.json').write_text(index if where is None else where)
    return folder


def adapter(folder, config=(), names=str, scale=1.):
    folder.mkdir()
    about = dict(peft_type='LORA', r=2, lora_alpha=2, target_modules=['0']) | dict(config)
    (folder/'adapter_config.json').write_text(json.dumps(about))
    parts = {'lora_A': torch.ones(2, 4), 'lora_B': torch.ones(6, 2) * scale}
    save_file({names(f'base_model.model.h.0.{n}.weight'): x for n, x in parts.items()}, folder/'adapter_model.safetensors')


class Runs:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)


def pickled(folder, old):
    model(folder, {}).joinpath('model.safetensors').unlink()
    state = {'a': Runs(folder/'ran')}
    if old: (folder/'pytorch_model.bin').write_bytes(pickle.dumps(state))
    else: torch.save(state, folder/'pytorch_model.bin')


def changed(k, f): return {n: f(x) if n == k else x for n, x in toy(1).items()}
def cut(file, n): file.write_bytes(file.read_bytes()[:n])


W, ALIKE = 'h.1.weight', 'fuse models of one architecture, each with all of its files'
BAD = { # what is wrong with the expert → (how it is made in a folder, what is said)
    'truncated shard': (lambda d: cut(sharded(d)/next(iter(SHARDS)), 200), 'is cut off: its header announces'),
    'index that is no JSON': (lambda d: sharded(d, '{"weight_map": '), 'model.safetensors.index.json is no valid JSON'),
    'no index': (lambda d: sharded(d).joinpath('model.safetensors.index.json').unlink(), 'add the index, or name one file'),
    'index without map': (lambda d: sharded(d, '{}'), 'has no `weight_map`'),
    'missing shard': (lambda d: sharded(d).joinpath(next(iter(SHARDS))).unlink(),
        'which model.safetensors.index.json lists; copy or download'),
    'shard that lacks a key': (lambda d: sharded(d, lose=[W]),
        f"the index places {W!r} in model-00002-of-00002.safetensors, which lacks it"),
    'key in two shards': (lambda d: sharded(d, twice=[W]), f"{W!r} is stored twice"),
    'missing parameter': (lambda d: model(d, {k: v for k, v in toy(1).items() if k != W}),
        f"lacks {W!r}, which the base has; {ALIKE}"),
    'extra parameter': (lambda d: model(d, toy(1) | {'h.2.weight': torch.ones(1)}),
        f"has 'h.2.weight', which the base lacks; {ALIKE}"),
    'other shape': (lambda d: model(d, changed(W, lambda x: x[:3])), f"{W!r}: expected shape (6, 4), got (3, 4); {ALIKE}"),
    'whole numbers': (lambda d: model(d, changed(W, torch.Tensor.int)), 'got torch.int32; save it as the base is'),
    'NaN': (lambda d: model(d, changed(W, lambda x: x * torch.nan)), f"{W!r}: expected finite numbers, got NaN or infinity"),
    'infinity in bfloat16': (lambda d: model(d, changed(W, lambda x: (x * torch.inf).bfloat16())), 'got NaN or infinity'),
    'zero bytes': (lambda d: model(d, toy(1)).joinpath('model.safetensors').write_bytes(b''),
        'is empty (0 bytes); copy or download'),
    'no model': (lambda d: d.mkdir(), 'in it, an empty folder'),
    'garbage': (lambda d: model(d, toy(1)).joinpath('model.safetensors').write_bytes(b'\xff' * 99), 'or no safetensors file'),
    'code in a pickle': (lambda d: pickled(d, False),
        'reading it could run code, so it was not read; ask its author for safetensors'),
    'code in an old pickle': (lambda d: pickled(d, True), 'reading it could run code, so it was not read'),
    'base once more': (lambda d: model(d, toy(0)), 'hold the same weights; give each model once'),
    'other architecture': (lambda d: model(d, toy(1), '{"model_type": "bert"}'), "model_type is 'bert', of the base 'toy'"),
    'config that is no JSON': (lambda d: model(d, toy(1), '{"model_type"'), 'config.json is no valid JSON'),
    'config of other types': (lambda d: model(d, toy(1), '{"id2label": 3}'), '`id2label` must be a mapping, got 3'),
    'config without row numbers': (lambda d: model(d, toy(1), '{"id2label": {"a": "b"}}'), '`id2label` must name rows by number'),
    'living fusion': (lambda d: model(d, toy(1)).joinpath('model.safetensors').rename(d/'fusion.safetensors'),
        '`direction-fusion export` first'),
    'folder for a file': (lambda d: (d/'model.safetensors').mkdir(parents=True),
        'it is a folder in the place of a file; move it away'),
    'adapter without weights': (lambda d: (adapter(d), (d/'adapter_model.safetensors').unlink()),
        'holds neither adapter_model.safetensors nor'),
    'adapter of other weights': (lambda d: adapter(d, names=lambda n: n.replace('h.0', 'g.0')), "adapts 'g.0.weight', which"),
    'adapter of another rank': (lambda d: adapter(d, dict(r=4)),
        'expected rank 4 as the config says, got lora_A of shape (2, 4)'),
    'adapter of rank zero': (lambda d: adapter(d, dict(r=0)), '`r` must be a number above 0, got 0'),
    'adapter with a word for alpha': (lambda d: adapter(d, dict(lora_alpha='x')),
        "`lora_alpha` must be a number above 0, got 'x'"),
    'adapter with a bad pattern': (lambda d: adapter(d, dict(rank_pattern={'(': 2})), '`rank_pattern` cannot be read'),
    'adapter with NaN': (lambda d: adapter(d, scale=torch.nan), 'expected finite numbers, got NaN or infinity')}


@pytest.fixture
def world(tmp_path, monkeypatch):
    "A folder with a base and an expert, to work in."
    for t, n in enumerate(('base', 'good')): model(tmp_path/n, toy(2 * t))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuses(says, *args): # one line, exit code 2, nothing else in the folder than before
    before = sorted(os.walk('.'))
    code, out, err = call(*args)
    assert code == 2 and says in err and err.count('\n') == 1 and err.startswith('direction-fusion: ') and not out, err
    assert sorted(os.walk('.')) == before


@pytest.mark.parametrize('case', BAD)
def test_commands_refuse_a_bad_expert(world, case):
    make, says = BAD[case]
    make(world/'bad model')
    refuses(says, 'fuse', 'base', 'good', 'bad model', '-o', 'fused')
    refuses(says, 'add', 'state', 'bad model', '--base', 'base')
    (world/'recipe.yaml').write_text('method: dora\nbase: base\nexperts: [good, bad model]\n')
    refuses(says, 'fuse', 'recipe.yaml', '-o', 'fused')
    code, _, err = call('inspect', 'base', 'good', 'bad model', '-m', 'dora')
    assert code in (0, 2) and err.count('\n') <= 1
    assert call('add', 'state', 'good', '--base', 'base')[0] == 0 # a living fusion that is there stays as it is
    refuses(says, 'add', 'state', 'bad model')
    assert not (world/'bad model'/'ran').exists()


@pytest.mark.parametrize('says, args', [
    ("`--html` must be a file to write", ('inspect', 'base', 'good', '--html', 'good')),
    ("holds 'good', which is read", ('fuse', 'base', 'good', '-o', 'good', '--overwrite')),
    ("no fusion wrote it", ('fuse', 'base', 'good', '-o', 'taken', '--overwrite')),
    ("exists; choose another folder", ('fuse', 'base', 'good', '-o', 'taken')),
    ("is a link; name the folder itself", ('fuse', 'base', 'good', '-o', 'link')),
    ("is a file; choose another name", ('fuse', 'base', 'good', '-o', 'base/config.json')),
    ("too long a name", ('fuse', 'base', 'good', '-o', 'x' * 250)),
    ("its parent folder cannot be made", ('fuse', 'base', 'good', '-o', 'base/config.json/x')),
    ("got an empty text", ('fuse', 'base', '')),
    ("the same files; give each model once", ('fuse', 'base', 'good', 'good')),
    ("the same files; give each model once", ('fuse', 'base', 'good', 'good/model.safetensors')),
    ("`weights` must be finite, got nan", ('fuse', 'base', 'good', '-m', 'soft_soup', '--weights', 'nan')),
    ("must not sum to 0", ('fuse', 'base', 'good', '-m', 'soft_soup', '--weights', '0')),
    ("`weight` must be finite, got inf", ('add', 'state', 'good', '--base', 'base', '-m', 'soft_soup', '--weight', 'inf')),
    ("`labels` must be one of agree, base, union, intersection", ('fuse', 'base', 'good', '--labels', 'x')),
    ("`tokens` must be one of agree, base", ('fuse', 'base', 'good', '--tokens', 'x')),
    ("name a folder of its own", ('add', 'taken', 'good', '--base', 'base')),
    ("is a file; a living fusion is a folder", ('add', 'base/config.json', 'good', '--base', 'base')),
    ("the first expert needs `base`", ('add', 'nothing', 'good')),
    ("holds no fusion: no fusion.safetensors in it", ('export', 'nothing', '-o', 'x')),
    ("holds no fusion: no fusion.safetensors in it", ('remove', 'nothing', 'good')),
    ("or one recipe file ending in .yaml, alone", ('fuse', 'recipe.yaml', 'good')),
    ("no recipe at nowhere.yaml", ('fuse', 'nowhere.yaml')),
    ("did you mean 'experts'?", ('fuse', 'typo.yaml')),
    ("recipe says the method, its parameters, weights and seed", ('fuse', 'recipe.yaml', '--weights', '1')),
    ("recipe says the method, its parameters, weights and seed", ('fuse', 'recipe.yaml', '--seed', '1')),
    ("the recipe is for 9 layers", ('fuse', 'nine.yaml')),
    ("hold the same adapter; give each once", ('fuse', 'lora', 'lora')),
    ("holds 'lora', which is read", ('fuse', 'lora', 'lora', '-o', 'lora', '--overwrite')),
    ("no fusion wrote it", ('fuse', 'lora', '-o', 'taken', '--overwrite'))],
    ids=lambda x: ' '.join(x) if isinstance(x, tuple) else '')
def test_commands_refuse_bad_requests(world, says, args):
    (world/'taken').mkdir()
    (world/'taken'/'diary').touch()
    (world/'link').symlink_to('nowhere')
    adapter(world/'lora')
    recipe = 'method: soft_soup\nbase: base\nexperts: [good]\n'
    for n, text in dict(recipe=recipe, typo=recipe.replace('experts', 'expert'), nine=recipe + 'layers: 9\n').items():
        (world/f'{n}.yaml').write_text(text)
    refuses(says, *args)


@pytest.mark.parametrize('option', [('--threads', -1), ('--adapter-rank', 0), ('--seed', -1)], ids=str)
def test_numbers_out_of_range(world, option):
    code, _, err = call('fuse', 'base', 'good', '-o', 'fused', *option)
    assert code == 2 and option[0] in err and 'Traceback' not in err and not (world/'fused').exists()


def test_a_base_that_is_wrong(world):
    for state, says in [(changed(W, lambda x: x * torch.nan), f"bad, {W!r}: expected finite numbers"),
                        (changed(W, torch.Tensor.int), 'save it as the base is'),
                        ({k: v for k, v in toy(1).items() if k != W}, f"has {W!r}, which the base lacks; {ALIKE}")]:
        model(world/'bad', state)
        for method in ('dora', 'soft_soup', 'ties', 'tsv_m'): refuses(says, 'fuse', 'bad', 'good', '-m', method, '-o', 'fused')
        refuses(says, 'add', 'state', 'good', '--base', 'bad')


def test_a_living_fusion_that_is_damaged_or_lost_its_base(world):
    assert call('add', 'state', 'good', '--base', 'base')[0] == 0
    file = world/'state'/'fusion.safetensors'
    whole = file.read_bytes()
    for wrong in (b'', whole[:500], b'\xff' * 99, (world/'base'/'model.safetensors').read_bytes()):
        file.write_bytes(wrong)
        for args in (('add', 'state', 'base'), ('remove', 'state', 'good'), ('export', 'state', '-o', 'x')):
            refuses('restore it, or fold' if b'format' not in wrong[:99] else 'fold the experts again', *args)
    file.write_bytes(whole)
    (world/'base').rename(world/'moved')
    refuses('the base of state is not to be had', 'export', 'state', '-o', 'x')
    assert call('export', 'state', '--base', 'moved', '-o', 'x')[0] == 0


def test_paths_with_spaces_and_letters_of_any_alphabet(world):
    odd = world/'ein Ordner'/'模型 é'
    (world/'ein Ordner').mkdir()
    (world/'good').rename(odd)
    for args in (('fuse', 'base', odd, '-o', 'ä b/ç'), ('add', 'стан', odd, '--base', 'base'), ('export', 'стан', '-o', 'ä b/d')):
        assert call(*args)[2] == ''
    assert torch.equal(open_checkpoint('ä b/ç')[W], open_checkpoint('ä b/d')[W])


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_commands_on_a_disk_that_is_full(world):
    small, large = world/'small', {k: torch.randn(40, 40) for k in NAMES}
    for t, n in enumerate(('base', 'good')): model(world/n, {k: v + t * torch.randn(v.shape) for k, v in large.items()})
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', small], capture_output=True, check=False).returncode:
        pytest.skip('no right to mount')
    try:
        assert call('add', 'state', 'good', '--base', 'base')[0] == 0
        refuses("no room for 'fused'", 'fuse', 'base', 'good', '-o', 'small/fused')
        refuses('failed (No space left on device); make room', 'fuse', 'base', 'good', '-o', 'small/lora', '--adapter-rank', 20)
        refuses('no room for the next state in small/state', 'add', 'small/state', 'good', '--base', 'base')
        refuses("no room for 'fused'", 'export', 'state', '-o', 'small/fused')
        assert os.listdir(small) == []
    finally: subprocess.run(['umount', '-l', small], check=True)


# Names of the hub

@pytest.fixture
def hub(world, monkeypatch):
    "A hub without a network: org/base, org/chat and the adapter org/lora, each by three revisions; what was asked of it."
    asked = []
    for r, t in dict(main=1, v1=2, refs_pr_1=3).items():
        model(world/'hub'/f'base {r}', toy(10 * t))
        model(world/'hub'/f'chat {r}', toy(10 * t + 1))
        adapter(world/'hub'/f'lora {r}', scale=float(t))
    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        asked.append((name, revision))
        org, _, kind = name.partition('/')
        folder = world/'hub'/f"{kind} {(revision or 'main').replace('/', '_')}"
        if org != 'org': raise OSError('no such model')
        if not folder.exists(): raise RevisionNotFoundError('404 Client Error', response=Mock(headers={}))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    return asked


def weights(folder): return dict(open_checkpoint(folder))
def mean(*states): return {k: sum(s[k].double() for s in states).div(len(states)).float() for k in NAMES}


def is_mean(folder, *states):
    for k, x in mean(*states).items(): torch.testing.assert_close(weights(folder)[k], x)


OURS = """method: soft_soup
base: org/base@v1
experts: [org/chat@v1, {model: org/chat@refs/pr/1, weight: 1}]
"""
THEIRS = """merge_method: linear
base_model: org/base@v1
models:
- {model: org/chat@v1, parameters: {weight: 1}}
- model: {model: {path: org/chat, revision: refs/pr/1}}
  parameters: {weight: 1}
parameters: {weight: 1}
"""


def test_revisions_on_the_command_line_in_recipes_and_from_python(world, hub):
    chats, names = ['org/chat@v1', 'org/chat@refs/pr/1'], ['chat@v1', 'chat@refs/pr/1']
    assert call('fuse', 'org/base@v1', *chats, '-m', 'soft_soup', '-o', 'a')[0] == 0
    assert set(hub) == {('org/base', 'v1'), ('org/chat', 'v1'), ('org/chat', 'refs/pr/1')}
    (world/'ours.yaml').write_text(OURS)
    assert call('fuse', 'ours.yaml', '-o', 'b')[0] == 0
    base, *experts = (open_checkpoint(f'org/{n}', revision=r) for n, r in [('base', 'v1'), ('chat', 'v1'), ('chat', 'refs/pr/1')])
    fuse_checkpoints(base, experts, 'soft_soup', 'c')
    for out in 'abc':
        is_mean(out, toy(21), toy(31))
        said, card = json.loads((world/out/'fusion.json').read_text()), (world/out/'README.md').read_text()
        assert [i['name'] for i in said['inputs']] == ['base@v1', *names], out
        assert (said['recipe']['base'], [e if isinstance(e, str) else e['model'] for e in said['recipe']['experts']]) == (
            'org/base@v1', chats), out
        for n in ('org/base@v1', *chats, *(f'| {n} |' for n in names)): assert n in card, (out, n)
    (world/'theirs.yaml').write_text(THEIRS)
    assert call('fuse', 'theirs.yaml', '-o', 'd')[0] == 0
    is_mean('d', toy(21), toy(31), toy(20)) # the base of mergekit's linear is one of the inputs
    assert call('fuse', 'org/base', 'org/chat', 'org/chat@v1', '-m', 'soft_soup', '-o', 'e')[0] == 0
    is_mean('e', toy(11), toy(21))


def test_revisions_of_adapters(world, hub):
    def adapted(x, t): return x | {'h.0.weight': x['h.0.weight'] + t * 2}
    assert call('fuse', 'org/base@v1', 'org/lora@v1', 'org/base@v1+org/lora@refs/pr/1', '-m', 'soft_soup', '-o', 'a')[0] == 0
    is_mean('a', adapted(toy(20), 2), adapted(toy(20), 3))
    said = json.loads((world/'a'/'fusion.json').read_text())
    assert [i['name'] for i in said['inputs']] == ['base@v1', 'lora@v1', 'lora@refs/pr/1']
    assert call('fuse', 'org/base@v1', 'org/lora@v1', '-m', 'soft_soup', '--adapter-rank', 2, '-o', 'b')[0] == 0
    config = json.loads((world/'b'/'adapter_config.json').read_text())
    assert (config['base_model_name_or_path'], config['revision']) == ('org/base', 'v1') # as PEFT wants them


def test_revisions_in_a_living_fusion(world, hub):
    assert call('add', 'state', 'org/chat@v1', '--base', 'org/base@v1', '-m', 'soft_soup')[0] == 0
    code, out, _ = call('add', 'state', 'org/chat@refs/pr/1')
    assert code == 0 and 'chat@v1, chat@refs/pr/1' in out
    assert call('export', 'state', '-o', 'a')[0] == 0
    is_mean('a', toy(21), toy(31))
    said = json.loads((world/'a'/'fusion.json').read_text())
    assert [i['name'] for i in said['inputs']] == ['base@v1', 'chat@v1', 'chat@refs/pr/1']
    assert said['recipe']['base'] == 'org/base@v1'
    assert '| base | base@v1 |' in (world/'a'/'README.md').read_text()
    refuses("'chat' is not in this fusion; experts: chat@v1, chat@refs/pr/1", 'remove', 'state', 'org/chat')
    assert call('remove', 'state', 'org/chat@v1')[0] == 0
    refuses('was made with a base of fingerprint', 'export', 'state', '--base', 'org/base', '-o', 'b')
    assert call('export', 'state', '--base', 'org/base@v1', '--adapter-rank', 2, '-o', 'b')[0] == 0
    config = json.loads((world/'b'/'adapter_config.json').read_text())
    assert (config['base_model_name_or_path'], config['revision']) == ('org/base', 'v1')


@pytest.mark.parametrize('expert, says', {
    'org/chat@': 'expected a branch, tag or commit after the @, got nothing; write one, or leave the @ out',
    'org/base+org/lora@': 'expected a branch, tag or commit after the @, got nothing',
    'org/chat@v9': "org/chat has no branch, tag or commit 'v9' on the hub",
    'else/chat@v1': 'else/chat@v1: no folder here, and not to be had from the hub (no such model)',
    'good@v1': "`revision` is for names of the hub, got 'v1' for 'good', which is here",
    './bad@v1': './bad@v1: no such file or folder'}.items())
def test_revisions_that_are_not_to_be_had(world, hub, expert, says):
    refuses(says, 'fuse', 'base', expert, '-o', 'fused')
    refuses(says, 'add', 'state', expert, '--base', 'base')
    refuses(says, 'inspect', 'base', expert)


def test_a_folder_with_an_at_in_its_name_wins(world, hub):
    model(world/'org'/'chat@v1', toy(5))
    model(world/'good@v1', toy(6))
    assert call('fuse', 'base', 'org/chat@v1', 'good@v1', '-m', 'soft_soup', '-o', 'fused')[0] == 0
    is_mean('fused', toy(5), toy(6))
    assert not hub
