"What may come from a disk: cut off, changed, unreadable, full. Nothing but `ValueError` and `OSError` may leave the reader."
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from direction_fusion.checkpoints import open_checkpoint
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
