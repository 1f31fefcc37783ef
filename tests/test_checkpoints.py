"Checkpoints on disk, end to end: eight architectures, any layout, broken-off runs, full disks, adapters, a living fusion."
import contextlib
import errno
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from direction_fusion import streaming, writing
from direction_fusion.adapters import open_expert
from direction_fusion.checkpoints import open_checkpoint
from direction_fusion.fusion import fuse
from direction_fusion.methods import METHODS
from direction_fusion.request import make_request
from direction_fusion.streaming import collect, fuse_checkpoints
from direction_fusion.vocabulary import attach_head
from direction_fusion.writing import verify

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLI = 'from direction_fusion.cli import main; main()'
T = 3 # experts


# Eight architectures

IDS = dict(input_ids=torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]]))
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
text = dict(vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=20)
vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)
special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)

# name → (model class, configuration, what it is asked, dtype, embeddings are tied)
ARCHITECTURES = dict(
    bert=('BertModel', 'BertConfig', text, IDS, torch.float32, False),
    roberta=('RobertaForMaskedLM', 'RobertaConfig', text, IDS, torch.float32, True),
    gpt2=('GPT2LMHeadModel', 'GPT2Config', special | dict(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=20), IDS,
          torch.float32, True),
    llama=('LlamaForCausalLM', 'LlamaConfig', text | special | dict(num_key_value_heads=1), IDS, torch.bfloat16, False),
    qwen2=('Qwen2ForCausalLM', 'Qwen2Config', text | special | dict(num_key_value_heads=1, tie_word_embeddings=True), IDS,
           torch.bfloat16, True),
    t5=('T5ForConditionalGeneration', 'T5Config', dict(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0), IDS | dict(decoder_input_ids=IDS['input_ids']), torch.float32, True),
    vit=('ViTModel', 'ViTConfig', vision, dict(pixel_values=PIXELS), torch.float32, False),
    clip=('CLIPModel', 'CLIPConfig', dict(projection_dim=8, text_config=text | special, vision_config=vision),
          IDS | dict(pixel_values=PIXELS), torch.float32, False))


def model_of(name, seed=0):
    "A tiny model; every seed but 0 is the base of seed 0, moved."
    cls, config, kw, _, dtype, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**kw)).to(dtype).eval()
    for p in model.parameters(): p.data += .02 * torch.randn(p.shape).to(dtype) # no bias stays zero, no norm one
    if seed:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters(): p.data += (.05 * torch.randn(p.shape, generator=g)).to(dtype)
    return model


def save(model, folder, layout):
    "As one file, in shards, or as PyTorch's own file."
    if layout == 'bin':
        model.save_pretrained(folder)
        tied = len(load_file(folder/'model.safetensors')) < len(model.state_dict()) # such a file has both names
        torch.save(model.state_dict() if tied else load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
        (folder/'model.safetensors').unlink()
    else: model.save_pretrained(folder, max_shard_size='6KB' if layout == 'shards' else '5GB')


@pytest.fixture(scope='session')
def models(tmp_path_factory):
    "Folder of base, expert1 … expert3 of an architecture, each in a layout of its own; made when asked for."
    root, made = tmp_path_factory.mktemp('models'), {}
    def of(name):
        if name not in made:
            turn = list(ARCHITECTURES).index(name) # over the architectures, the base comes in every layout too
            for seed in range(T + 1):
                layout = ('one', 'shards', 'bin')[(seed + turn) % 3]
                save(model_of(name, seed), root/name/(f'expert{seed}' if seed else 'base'), layout)
            made[name] = root/name
        return made[name]
    return of


def experts_of(folder): return [folder/f'expert{t}' for t in range(1, T + 1)]


@pytest.fixture(scope='session')
def states(models):
    "State dicts of base and experts as transformers loads them, tied names once; and the names left out."
    @functools.cache
    def of(name):
        base, *experts = (load(name, f).state_dict() for f in (models(name)/'base', *experts_of(models(name))))
        twice = [k for i, k in enumerate(base) if any(base[k].data_ptr() == base[j].data_ptr() for j in list(base)[:i])]
        return *({k: v for k, v in s.items() if k not in twice} for s in (base, *experts)), twice
    return of


def load(name, folder):
    "The model in a folder, and that nothing was missing, left over or of another shape."
    model, info = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    return model.eval()


def answer(model, asked):
    with torch.no_grad(): out = model.float()(**asked)
    return next(out[k] for k in ('logits', 'logits_per_image', 'last_hidden_state') if k in out)


@pytest.mark.parametrize('method', ['soft_soup', 'dora', 'opcm', 'ties', 'karcher'])
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_fused_model_loads_and_answers_as_in_memory(models, states, tmp_path, name, method):
    folder, (*_, asked, dtype, tied) = models(name), ARCHITECTURES[name]
    experts = experts_of(folder)[:2] if method == 'dora' else experts_of(folder)
    fuse_checkpoints(folder/'base', experts, method, tmp_path/'fused')
    assert verify(tmp_path/'fused') > 20
    fused = load(name, tmp_path/'fused')
    assert {p.dtype for p in fused.parameters()} == {dtype}

    base, *others, twice = states(name) # through transformers, not through us
    assert bool(twice) == tied
    other, alone = model_of(name), model_of(name)
    other.load_state_dict(fuse(base, others[:len(experts)], method), strict=not tied)
    other.tie_weights()
    kind = dict(rtol=2**-7, atol=2**-9) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-6)
    assert_close(dict(fused.state_dict()), dict(other.state_dict()), **kind)
    got, want = answer(fused, asked), answer(other, asked)
    assert_close(got, want, rtol=0, atol=(.02 if dtype == torch.bfloat16 else 1e-4) * want.abs().max().item())
    assert not torch.allclose(want, answer(alone, asked), rtol=1e-2) # fused is not base


@pytest.mark.parametrize('name', ['gpt2', 'qwen2', 't5'])
def test_auto_class_finds_the_fused_model(models, tmp_path, name):
    done = fuse_checkpoints(models(name)/'base', experts_of(models(name)), 'soft_soup', tmp_path/'fused', max_shard='6kB')
    assert len(list((tmp_path/'fused').glob('model-*.safetensors'))) > 1
    assert type(AutoModel.from_pretrained(tmp_path/'fused')).__name__.startswith(ARCHITECTURES[name][0].split('For')[0][:4])
    assert [i['name'] for i in done['inputs']] == ['base', 'expert1', 'expert2', 'expert3']
    card = (tmp_path/'fused'/'README.md').read_text()
    assert card.startswith('---\n') and METHODS['soft_soup'].cite in card and str(models(name)) not in card.split('## Recipe')[0]


# The same bits, and the right ones

STREAMED = [n for n, m in METHODS.items() if m.kind in ('sequential', 'joint') and not m.needs]


def bits(state): return {k: v.reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in state.items()}
def read_all(folder): return dict(open_checkpoint(folder))


@pytest.fixture(scope='session')
def large(tmp_path_factory):
    "A base and three experts in bfloat16 with a table and a map that torch itself would share out among threads."
    root, g = tmp_path_factory.mktemp('large'), torch.Generator().manual_seed(0)
    shapes = {'wte.weight': (900, 64), 'up.weight': (240, 160), 'norm.weight': (160,), 'up.bias': (240,), 'scale': ()}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    for f in ('base', *(f'expert{t}' for t in range(1, T + 1))):
        (root/f).mkdir()
        moved = {k: (v + (f != 'base') * .1 * torch.randn(v.shape, generator=g)).bfloat16() for k, v in base.items()}
        save_file(moved | {'n': torch.tensor(7)}, root/f/'model.safetensors', {'format': 'pt'})
    return root


@pytest.mark.parametrize('method', STREAMED)
def test_same_bits_whatever_the_chunk_and_the_threads(large, method):
    base, *experts = map(open_checkpoint, (large/'base', *experts_of(large)[:METHODS[method].most]))
    request = make_request(base, experts, method, **({'steps': 2} if method == 'wudi' else {}))
    want, before = bits(collect(request, 1)), torch.get_num_threads()
    try:
        for chunk, threads, of_torch in [(700, 2, 1), (40_000, 3, 3)]:
            torch.set_num_threads(of_torch)
            assert bits(collect(replace(request, chunk=chunk), threads)) == want, (chunk, threads, of_torch)
            assert torch.get_num_threads() == of_torch # given back
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize('method', ['soft_soup', 'opcm', 'ties'])
def test_same_bits_whatever_the_shards(large, tmp_path, method):
    base, *experts = map(open_checkpoint, (large/'base', *experts_of(large)))
    want = bits(collect(make_request(base, experts, method)))
    said = []
    for max_shard, threads in [('5GB', 1), ('60kB', 2), (1, 3)]:
        out, size = tmp_path/f'{threads}', dict(max_shard=max_shard, threads=threads)
        said.append(fuse_checkpoints(large/'base', experts_of(large), method, out, **size))
        assert bits(read_all(out)) == want
    assert [len(list((tmp_path/f'{n}').glob('*.safetensors'))) for n in (1, 2, 3)] == [1, 3, 6]
    assert said[0] == said[1] == said[2] # fusion.json says nothing of shards and threads


def nearest(x, digits=8, least=-126):
    "The bfloat16 nearest to a fraction, ties to even, in whole numbers alone."
    if not x: return 0.
    e = max(abs(x).numerator.bit_length() - abs(x).denominator.bit_length(), least)
    while abs(x) < Fraction(2)**e and e > least: e -= 1
    while abs(x) >= Fraction(2)**(e + 1): e += 1
    return float(round(x / Fraction(2)**(e - digits + 1)) * Fraction(2)**(e - digits + 1))


def test_the_oracle_rounds():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, generator=g) * 10.**p for p in (-39, -3, 0, 5)]) # of float32, torch rounds in one step
    assert [nearest(Fraction(v)) for v in x.tolist()] == x.bfloat16().double().tolist()
    assert nearest(1 + Fraction(1, 256) + Fraction(1, 2**80)) == 1 + 2**-7 and nearest(1 + Fraction(1, 256)) == 1.


def exact(method, b, es, w, params):
    "A number of the fused model as a fraction."
    if method == 'soft_soup': return sum(v * Fraction(e) for v, e in zip(w, es)) / sum(w)
    return b + Fraction(params['lam']) * sum(v * (Fraction(e) - b) for v, e in zip(w, es))


@pytest.mark.parametrize('method, weights, params', [
    ('soft_soup', None, {}), ('soft_soup', [1, 2, 5], {}), ('task_arithmetic', None, {'lam': .375}),
    ('task_arithmetic', [2, .5, 1], {'lam': 1.})])
def test_bfloat16_is_rounded_once(large, method, weights, params):
    "Against fractions. Three bfloat16 numbers are often the same distance apart, so ties do occur."
    models = [open_checkpoint(f) for f in (large/'base', *experts_of(large))]
    got = collect(make_request(models[0], models[1:], method, weights, **params))
    w = [Fraction(v) for v in weights or [1] * T]
    for k in ('up.weight', 'norm.weight', 'scale'):
        b, *es = (m[k].double().reshape(-1)[:8000].tolist() for m in models)
        want = [nearest(exact(method, Fraction(x), xs, w, params)) for x, *xs in zip(b, *es)]
        assert got[k].double().reshape(-1)[:8000].tolist() == want, k


def test_bfloat16_of_a_decimal_factor(large):
    "0.4 is no float64: what counts is the float64 answer, rounded once."
    models = [open_checkpoint(f) for f in (large/'base', *experts_of(large))]
    got = collect(make_request(models[0], models[1:], 'task_arithmetic', lam=.4))['up.weight']
    b, *es = (m['up.weight'].double() for m in models)
    want = b + .4 * sum(e - b for e in es)
    assert got.double().reshape(-1)[:9000].tolist() == [nearest(Fraction(v)) for v in want.reshape(-1)[:9000].tolist()]


def test_bfloat16_slerp_is_rounded_once(large):
    "Against numpy: on the arc between two models, float64, and the fractions' rounding."
    import numpy as np
    base, a, b = map(open_checkpoint, (large/'base', *experts_of(large)[:2]))
    got = collect(make_request(base, [a, b], 'slerp', t=.3, on='weight', grain='tensor'))
    for k in ('wte.weight', 'up.weight', 'up.bias'):
        x, y = (m[k].double().numpy().reshape(-1) for m in (a, b))
        angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        want = (np.sin(.7 * angle) * x + np.sin(.3 * angle) * y) / np.sin(angle)
        assert got[k].double().reshape(-1)[:5000].tolist() == [nearest(Fraction(v)) for v in want[:5000].tolist()], k


# Broken off

SLOW = '''
import time
import direction_fusion.streaming as s
fitted = s.fitted
s.fitted = lambda *a: (time.sleep(.1), fitted(*a))[1]
'''


@pytest.fixture(scope='session')
def maps(tmp_path_factory):
    "A base and three experts of thirty small maps."
    root, g = tmp_path_factory.mktemp('maps'), torch.Generator().manual_seed(0)
    for f in ('base', *(f'expert{t}' for t in range(1, T + 1))):
        (root/f).mkdir()
        state = {f'h.{i}.weight': torch.randn(8, 6, generator=g) for i in range(30)}
        save_file(state, root/f/'model.safetensors', {'format': 'pt'})
    return root


@pytest.fixture(scope='session')
def undisturbed(maps, tmp_path_factory):
    "Files of an undisturbed run."
    @functools.cache
    def of(method):
        out = tmp_path_factory.mktemp('undisturbed')/'fused'
        fuse_checkpoints(maps/'base', experts_of(maps), method, out)
        return files_in(out)
    return of


NO_CONFIG = 'note: the base has no config.json, so {} has none, and AutoModel will not load it; put one beside its weights\n'


def files_in(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@contextlib.contextmanager
def running(maps, out, method='dora'):
    "The command, slowed down, in a process of its own that stands still since three parameters were whole; and these."
    env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    p = subprocess.Popen([sys.executable, '-c', SLOW + CLI, 'fuse', maps/'base', *experts_of(maps), '-m', method, '-o', out],
                         env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a background job may ignore it
    try:
        journal, deadline = out.parent/f'.{out.name}.part'/'.journal', time.time() + 120
        whole = lambda: journal.read_text().split('\n')[1:-1] if journal.exists() else []
        while len(whole()) < 3 and p.poll() is None and time.time() < deadline: time.sleep(.02)
        assert p.poll() is None, f'ended before it could be broken off:\n{p.communicate()[0]}'
        os.killpg(p.pid, signal.SIGSTOP)
        os.waitpid(p.pid, os.WUNTRACED) # a signal takes its time
        yield p, {json.loads(s)[0] for s in whole()}
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.communicate()


def nothing_to_load(out):
    assert not out.exists()
    with pytest.raises((ValueError, OSError)): open_checkpoint(out.parent/f'.{out.name}.part')
    with pytest.raises((ValueError, OSError)): AutoModel.from_pretrained(out.parent/f'.{out.name}.part')


def test_killed_in_the_middle_goes_on(maps, undisturbed, tmp_path, monkeypatch):
    out, read = tmp_path/'fused', set()
    again = lambda: fuse_checkpoints(str(maps/'base'), list(map(str, experts_of(maps))), 'dora', out)
    with running(maps, out) as (p, whole):
        assert 3 <= len(whole) < 30
        nothing_to_load(out)
        with pytest.raises(ValueError, match="another run is writing 'fused'; wait for it"): again()
        os.killpg(p.pid, signal.SIGKILL)
        assert p.wait(30) == -signal.SIGKILL
    nothing_to_load(out)
    inner = streaming.read_deltas
    monkeypatch.setattr(streaming, 'read_deltas', lambda base, experts, k, *a: (read.add(k), inner(base, experts, k, *a))[1])
    again()
    assert read.isdisjoint(whole) and len(read | whole) == 30 # nothing finished was done again
    assert files_in(out) == undisturbed('dora') and os.listdir(tmp_path) == ['fused']


def test_ctrl_c_says_how_to_go_on(maps, undisturbed, tmp_path):
    out = tmp_path/'fused'
    with running(maps, out) as (p, whole):
        os.killpg(p.pid, signal.SIGINT)
        os.killpg(p.pid, signal.SIGCONT)
        said = p.communicate(timeout=60)[0]
        assert p.returncode == 130 and 'Traceback' not in said
        nothing_to_load(out)
    code, _, err = call('fuse', maps/'base', *experts_of(maps), '-o', out)
    assert (code, err) == (0, NO_CONFIG.format(out)) and files_in(out) == undisturbed('dora')
    assert 'the same command goes on' in said, said


def call(*args):
    "The command in this process: exit code, standard output, standard error."
    from direction_fusion.cli import main
    out, err, argv, env = io.StringIO(), io.StringIO(), sys.argv, dict(os.environ)
    sys.argv, code = ['direction-fusion', *map(str, args)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
    except SystemExit as e: code = e.code
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(env)
    return code or 0, out.getvalue(), err.getvalue()


@pytest.mark.parametrize('method', ['soft_soup', 'opcm', 'ties', 'tsv_m', 'dare'])
def test_broken_off_by_any_error_goes_on(maps, undisturbed, tmp_path, monkeypatch, method):
    "Methods with a first pass, with a second one, that draw: what goes on gives what was never broken off."
    out, finish, calls = tmp_path/'fused', writing.ShardWriter.finish, []
    def stops(self, k):
        calls.append(k)
        if len(calls) > 9: raise KeyboardInterrupt
        return finish(self, k)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(writing.ShardWriter, 'finish', stops)
        fuse_checkpoints(maps/'base', experts_of(maps), method, out, threads=2)
    nothing_to_load(out)
    fuse_checkpoints(maps/'base', experts_of(maps), method, out)
    assert files_in(out) == undisturbed(method)


def test_a_base_without_configuration_is_told(maps, tmp_path):
    "Once, on standard error, where the output is a model; and not where it is an adapter, or the base has one."
    fused, alive, thin, whole = (tmp_path/n for n in ('fused', 'alive', 'thin', 'whole'))
    assert call('fuse', maps/'base', maps/'expert1', '-o', fused)[2] == NO_CONFIG.format(fused)
    assert call('add', tmp_path/'state', maps/'expert1', '--base', maps/'base')[2] == ''
    assert call('export', tmp_path/'state', '-o', alive)[2] == NO_CONFIG.format(alive)
    assert call('fuse', maps/'base', maps/'expert1', '-o', thin, '--adapter-rank', 2)[2] == ''
    (fused/'config.json').write_text('{"model_type": "toy"}')
    assert call('fuse', fused, maps/'expert2', '-o', whole)[2] == ''


def test_another_request_starts_anew(maps, undisturbed, tmp_path):
    out = tmp_path/'fused'
    def stop(done, total):
        if done > total / 2: raise KeyboardInterrupt
    for kw in (dict(method='soft_soup'), dict(method='dora', rho=3.), dict(method='dora', dtype='float64')):
        with pytest.raises(KeyboardInterrupt): fuse_checkpoints(maps/'base', experts_of(maps), **kw, out=out, advance=stop)
    fuse_checkpoints(maps/'base', experts_of(maps), 'dora', out)
    assert files_in(out) == undisturbed('dora')


# Full, closed, taken, wrong

def refused(says, *args, error=(ValueError, OSError), **kw):
    with pytest.raises(error) as e: fuse_checkpoints(*args, **kw)
    assert all(s in str(e.value) for s in ([says] if isinstance(says, str) else says)) and '\n' not in str(e.value), e.value


def test_full_disk_is_noticed_before_and_survived_in_between(maps, undisturbed, tmp_path, monkeypatch):
    out, args, pwrite, written = tmp_path/'fused', (maps/'base', experts_of(maps), 'dora'), os.pwrite, []
    with monkeypatch.context() as m:
        m.setattr('shutil.disk_usage', lambda p: type('Usage', (), dict(free=100)))
        refused("no room for 'fused'", *args, out=out, error=OSError)
        assert os.listdir(tmp_path) == []
    def full(*a):
        written.append(a)
        if len(written) > 12: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*a)
    with monkeypatch.context() as m:
        m.setattr('os.pwrite', full)
        refused(['fused/model.safetensors', 'No space left'], *args, out=out, error=OSError, threads=1)
    nothing_to_load(out)
    fuse_checkpoints(*args, out)
    assert files_in(out) == undisturbed('dora')


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_disk_with_room_for_the_output_alone(large, tmp_path):
    "Merged deltas that wait for the scale of the whole model need room as well."
    small = tmp_path/'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=260k', 'tmpfs', small], capture_output=True, check=False).returncode:
        pytest.skip('no right to mount')
    try:
        fuse_checkpoints(large/'base', experts_of(large), 'soft_soup', small/'soup')
        verify(small/'soup')
        for p in (small/'soup').iterdir(): p.unlink()
        (small/'soup').rmdir()
        refused('no room', large/'base', experts_of(large), 'opcm', small/'fused', error=OSError)
        assert not (small/'fused').exists()
    finally: subprocess.run(['umount', '-l', small], check=True) # lazily: a failure holds files open


def test_folder_without_the_right_to_write(maps):
    folder, uids = Path(mkdtemp()), os.getresuid() # pytest's own folders are closed to other users
    models = [open_checkpoint(f) for f in (maps/'base', *experts_of(maps))]
    folder.chmod(0o555)
    if not os.geteuid(): os.setresuid(65534, 65534, 0) # root may write everywhere
    try: refused('no right to write', models[0], models[1:], 'dora', folder/'fused', error=PermissionError)
    finally: os.setresuid(*uids)
    assert os.listdir(folder) == []
    folder.rmdir()


def test_output_that_is_there_or_among_the_inputs(maps, tmp_path):
    base, experts = maps/'base', experts_of(maps)
    before = {f: files_in(f) for f in (base, *experts)}
    for kw in ({}, dict(overwrite=True)):
        refused('which is read', base, experts, 'dora', base, **kw)
        refused('which is read', base, experts, 'dora', maps, **kw) # holds the inputs
    fuse_checkpoints(base, experts, 'soft_soup', tmp_path/'fused')
    refused("exists; choose another folder, or pass overwrite", base, experts, 'dora', tmp_path/'fused')
    code, _, err = call('fuse', base, *experts, '-o', tmp_path/'fused')
    assert code == 2 and err.count('\n') == 1 and 'exists; choose another folder, or pass overwrite' in err
    fuse_checkpoints(base, experts, 'dora', tmp_path/'fused', overwrite=True)
    refused('which is read', base, [tmp_path/'fused'], 'dora', tmp_path/'fused', overwrite=True) # it is an expert now
    assert verify(tmp_path/'fused') == 30 and {f: files_in(f) for f in before} == before


def test_nan_in_the_middle_of_an_expert(maps, tmp_path):
    state = load_file(maps/'expert2'/'model.safetensors')
    state['h.17.weight'][5, 3] = torch.nan
    (tmp_path/'broken').mkdir()
    save_file(state, tmp_path/'broken'/'model.safetensors', {'format': 'pt'})
    for method in ('soft_soup', 'opcm', 'ties', 'tsv_m'):
        refused(['broken', "'h.17.weight'", 'NaN'], maps/'base', [maps/'expert1', tmp_path/'broken'], method, tmp_path/'fused')
        assert not (tmp_path/'fused').exists()
    fuse_checkpoints(maps/'base', experts_of(maps), 'soft_soup', tmp_path/'fused') # what was left does no harm


def test_experts_that_cannot_be(models, maps, tmp_path):
    llama, out = models('llama'), tmp_path/'fused'
    refused(['expert1', 'same file'], llama/'base', [llama/'expert1', llama/'expert2', llama/'expert1'], 'dora', out)
    (tmp_path/'link').symlink_to(llama/'expert1')
    refused('same file', llama/'base', [llama/'expert1', tmp_path/'link'], 'dora', out)
    refused(['qwen2', 'llama'], llama/'base', [llama/'expert1', models('qwen2')/'expert1'], 'dora', out)
    refused('gpt2', maps/'base', [models('gpt2')/'expert1'], 'dora', out)
    refused("expert1", models('gpt2')/'base', [maps/'expert1'], 'dora', out)
    refused('no such file or folder', llama/'base', [tmp_path/'nowhere'], 'dora', out)
    assert os.listdir(tmp_path) == ['link']


# Adapters

@pytest.fixture(scope='session')
def adapted(models, tmp_path_factory):
    "A base, two LoRA adapters of unequal rank made by PEFT, and the full models that they make of the base."
    root, base = tmp_path_factory.mktemp('adapted'), models('bert')/'expert1' # a folder that transformers wrote in shards
    for t, (r, targets) in enumerate([(2, ['query', 'value']), (3, ['query', 'dense'])], 1):
        torch.manual_seed(t)
        m = get_peft_model(load('bert', base), LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False))
        m.save_pretrained(root/f'lora{t}')
        wide = PeftModel.from_pretrained(load('bert', base).double(), root/f'lora{t}').double() # float32 adds directions
        wide.merge_and_unload().save_pretrained(root/f'full{t}')
    return base, [root/f'lora{t}' for t in (1, 2)], [root/f'full{t}' for t in (1, 2)]


def test_what_fuses_where_no_method_is_named(adapted, tmp_path):
    "Adapters, with their base or alone, in Python and on the command line; one whole model among them, and it is DoRA."
    base, loras, full = adapted
    for experts, method in [(loras, 'dora_sides'), ([f'{base}+{loras[0]}', loras[1]], 'dora_sides'), ([loras[0], full[1]], 'dora'),
                            (full, 'dora')]:
        assert fuse_checkpoints(base, experts, out=tmp_path/'fused', overwrite=True)['method'] == method
        assert fuse_checkpoints(base, experts, out=tmp_path/'cast', read_dtype='float64', overwrite=True)['method'] == method
        code, said, err = call('fuse', base, *experts, '-o', tmp_path/'fused', '--overwrite')
        assert code == 0 and f'fused by {method}\n' in said, err
    assert 'fused by dora_sides\n' in call('fuse', *loras, '-o', tmp_path/'alone')[1]
    for first, method in [(loras[0], 'dora_sides'), (full[0], 'dora')]: # a living fusion goes by the first
        assert f'{method} of {first.name}\n' in call('add', tmp_path/method, first, '--base', base)[1]
        assert f'{method} of {first.name}, other\n' in call('add', tmp_path/method, loras[1], '--name', 'other')[1]
    assert call('export', tmp_path/'dora_sides', '-o', tmp_path/'out')[0] == 0
    fuse_checkpoints(base, loras, out=tmp_path/'at once')
    assert_close(read_all(tmp_path/'out'), read_all(tmp_path/'at once'), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('method', ['dora', 'soft_soup'])
def test_adapters_are_the_weights_they_stand_for(adapted, tmp_path, method):
    base, loras, full = adapted
    fuse_checkpoints(base, loras, method, tmp_path/'thin')
    fuse_checkpoints(base, full, method, tmp_path/'full')
    fuse_checkpoints(base, [f'{base}+{loras[0]}', full[1]], method, tmp_path/'mixed')
    want = read_all(tmp_path/'full')
    for out in ('thin', 'mixed'): assert_close(read_all(tmp_path/out), want, rtol=1e-5, atol=1e-6)
    assert_close(answer(load('bert', tmp_path/'thin'), IDS), answer(load('bert', tmp_path/'full'), IDS), rtol=1e-4, atol=1e-5)
    k = 'encoder.layer.0.output.dense.weight'
    assert not torch.equal(want[k], open_checkpoint(base)[k])


def test_model_and_adapter_in_one_expert(adapted, models, tmp_path):
    "A fully fine-tuned model that carries an adapter on top: its distance from the base is the sum of both."
    _, (lora, _), _ = adapted
    base, other = models('bert')/'base', models('bert')/'expert2'
    fuse_checkpoints(base, [f'{other}+{lora}'], 'soft_soup', tmp_path/'fused')
    peft = PeftModel.from_pretrained(load('bert', other), lora).merge_and_unload()
    assert_close(dict(load('bert', tmp_path/'fused').state_dict()), dict(peft.state_dict()), rtol=1e-5, atol=1e-6)


def test_adapter_of_another_base(adapted, models, tmp_path):
    for base in ('gpt2', 'llama'):
        refused(['lora1', 'base'], models(base)/'base', [adapted[1][0]], 'dora', tmp_path/'fused')
    refused(['adapter', 'model+adapter'], None, [adapted[1][0]], 'soft_soup', tmp_path/'fused')
    assert os.listdir(tmp_path) == []


def test_fused_delta_as_an_adapter(models, tmp_path):
    "Of full rank, it takes the base's linear maps to where the fused model has them; PEFT loads it."
    base, experts = models('llama')/'base', experts_of(models('llama'))
    fuse_checkpoints(base, experts, 'soft_soup', tmp_path/'fused', dtype='float32')
    code, out, err = call('fuse', base, *experts, '-m', 'soft_soup', '-o', tmp_path/'lora', '--adapter-rank', 16)
    assert code == 0, err
    m = PeftModel.from_pretrained(load('llama', base).float(), tmp_path/'lora').merge_and_unload().state_dict()
    full = read_all(tmp_path/'fused')
    linear = [k for k, r in make_request(*opened(base, experts), 'soft_soup').roles.items() if r == 'linear']
    assert len(linear) == 14
    for k in linear: assert_close(m[k], full[k], rtol=1e-3, atol=1e-4)


def test_dora_adapters_on_the_command_line(models, tmp_path):
    "Adapters of PEFT against a loop in float64 written from arXiv:2402.09353, eq. 5: as a model, as an adapter, of any rank."
    base, paths, T = models('llama')/'base', [tmp_path/'a1', tmp_path/'a2'], []
    W0 = {k: v.double() for k, v in read_all(base).items()}
    for t, path in enumerate(paths):
        torch.manual_seed(t)
        config = LoraConfig(r=2, lora_alpha=3 + t, target_modules=['q_proj', 'down_proj'], init_lora_weights=False, use_dora=True)
        peft = get_peft_model(load('llama', base).float(), config)
        for k, p in peft.named_parameters():
            if 'magnitude' in k: p.data *= 1 + .3 * torch.rand(p.shape) # lengths that are not those of the base
        peft.save_pretrained(path)
        parts, deltas = load_file(path/'adapter_model.safetensors'), {}
        for k in (k for k in parts if k.endswith('.lora_A.weight')):
            module = k.removesuffix('.lora_A.weight')
            A, B, m = (parts[f'{module}.{x}'].double() for x in ('lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector'))
            w = module.removeprefix('base_model.model.') + '.weight'
            V = W0[w] + (3 + t) / 2 * B @ A
            deltas[w] = torch.stack([m[i] * V[i] / V[i].square().sum().sqrt() for i in range(len(m))]) - W0[w]
        T.append(deltas)
    want = {k: (T[0][k] + T[1][k]) / 2 for k in T[0]}
    assert len(want) == 4
    code, _, err = call('fuse', *paths, '-m', 'soft_soup', '-o', tmp_path/'no')
    assert code == 2 and 'depends on the base' in err and '`direction-fusion fuse BASE ADAPTERS --adapter-rank R`' in err
    args = 'fuse', base, *paths, '-m', 'soft_soup'
    assert call(*args, '-o', tmp_path/'whole', '--dtype', 'float64')[0] == 0
    for k, x in read_all(tmp_path/'whole').items(): assert_close(x, W0[k] + want.get(k, 0), rtol=0, atol=1e-12)
    for r in (16, 3):
        assert call(*args, '-o', tmp_path/f'rank {r}', '--adapter-rank', r)[0] == 0
        peft = PeftModel.from_pretrained(load('llama', base).double(), tmp_path/f'rank {r}').double()
        made = peft.merge_and_unload().state_dict()
        for k, d in want.items():
            U, S, Vh = torch.linalg.svd(d, full_matrices=False)
            assert_close(made[k] - W0[k], U[:, :r] * S[:r] @ Vh[:r], rtol=0, atol=2e-6)


def test_killed_between_two_renames(models, tmp_path):
    "An adapter that is being replaced: the next run finds the old one, whole, and replaces it."
    base, (one, two, _) = models('llama')/'base', experts_of(models('llama'))
    fuse_checkpoints(base, [one], 'soft_soup', tmp_path/'lora', adapter_rank=2)
    before, rename = files_in(tmp_path/'lora'), Path.rename
    if not (child := os.fork()):
        def killed(self, to):
            if self.name == 'lora': rename(self, to); os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)
        Path.rename = killed
        try: fuse_checkpoints(base, [two], 'soft_soup', tmp_path/'lora', adapter_rank=2, overwrite=True, threads=1)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path/'lora').exists() and len(os.listdir(tmp_path)) == 2
    refused('exists; choose another folder', base, [two], 'soft_soup', tmp_path/'lora', adapter_rank=2)
    assert os.listdir(tmp_path) == ['lora'] and files_in(tmp_path/'lora') == before
    done = fuse_checkpoints(base, [two], 'soft_soup', tmp_path/'lora', adapter_rank=2, overwrite=True)
    assert os.listdir(tmp_path) == ['lora'] and verify(tmp_path/'lora') == len(done['outputs'])


def opened(base, experts): return open_expert(base), [open_expert(e) for e in experts]


# Heads and vocabularies

def test_heads_are_kept_and_attached(tmp_path):
    "Two classifiers of unequal labels: each head on the fused body answers as the same put together by hand."
    labels = dict(news=['world', 'sport', 'trade'], polar=['bad', 'good'])
    config = lambda names: BertConfig(**text, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    torch.manual_seed(0)
    body = transformers.BertModel(config(labels['polar'])).eval()
    body.save_pretrained(tmp_path/'base')
    experts = {}
    for n, names in labels.items():
        experts[n] = BertForSequenceClassification(config(names)).eval()
        experts[n].bert.load_state_dict({k: v + .05 * torch.randn(v.shape) if v.is_floating_point() else v
                                         for k, v in body.state_dict().items()})
        experts[n].save_pretrained(tmp_path/n)
    refused(['classifier', 'heads'], tmp_path/'news', [tmp_path/'polar'], 'dora', tmp_path/'fused')
    code, _, err = call('fuse', tmp_path/'base', tmp_path/'news', tmp_path/'polar', '-o', tmp_path/'fused', '--heads', 'keep')
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path/'fused'/'heads').iterdir()) == ['news.safetensors', 'polar.safetensors']
    fused = fuse(body.state_dict(), [e.bert.state_dict() for e in experts.values()], 'dora')
    for n, e in experts.items():
        folder = attach_head(tmp_path/'fused', tmp_path/'fused'/'heads'/f'{n}.safetensors', tmp_path/f'fused-{n}')
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info['missing_keys'] and not info['unexpected_keys'] and list(model.config.id2label.values()) == labels[n]
        e.bert.load_state_dict(fused)
        assert_close(answer(model.eval(), IDS), answer(e, IDS), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='session')
def headed(tmp_path_factory):
    "Bodies, classifiers of two, three and four labels, and a masked language model: all one BERT, moved."
    root = tmp_path_factory.mktemp('headed')
    def write(name, cls, seed, n=2, **kw):
        names = [f'{name} {i}' for i in range(n)]
        config = BertConfig(**text, id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)})
        torch.manual_seed(0)
        model, g = getattr(transformers, cls)(config, **kw), torch.Generator().manual_seed(seed)
        for p in model.parameters(): p.data += .05 * torch.randn(p.shape, generator=g)
        model.save_pretrained(root/name)
    for t, name in enumerate(('body', 'body1'), 1): write(name, 'BertModel', t)
    for n in (2, 3, 4): write(f'labels{n}', 'BertForSequenceClassification', 10 + n, n)
    write('other2', 'BertForSequenceClassification', 20)
    write('bare', 'BertModel', 3, add_pooling_layer=False)
    write('words', 'BertForMaskedLM', 21)
    write('span', 'BertForQuestionAnswering', 22) # without a pooler, as `words`
    return root


@pytest.mark.parametrize('base, experts', [
    ('body', ['labels3', 'labels4']), ('labels2', ['labels3', 'labels4']), ('labels2', ['other2', 'labels3']),
    ('labels2', ['body1']), ('labels2', ['body1', 'labels3']), ('body', ['labels3', 'span']), ('words', ['span'])])
def test_heads_of_any_shape_stay_apart(headed, tmp_path, base, experts):
    "Whatever heads the models have: the base's stays, the experts' are left out or kept; one by one as all at once."
    top = 'classifier', 'qa', 'cls'
    body = lambda n: {k.removeprefix('bert.'): v for k, v in read_all(headed/n).items() if not k.startswith(top)}
    shared = set.intersection(*(set(body(n)) for n in (base, *experts)))
    first, *others = ({k: body(n)[k] for k in shared} for n in (base, *experts))
    want = fuse(first, others, 'soft_soup')
    with_head = [n for n in experts if 'body' not in n]
    for heads in ('base', 'keep'):
        out, state = tmp_path/heads, tmp_path/f'state {heads}'
        assert call('fuse', headed/base, *(headed/n for n in experts), '-m', 'soft_soup', '-o', out, '--heads', heads)[2] == ''
        for n in experts[::-1]: # one that lacks the pooler has to come first
            begin = ('--base', headed/base, '-m', 'soft_soup', '--heads', heads) if n == experts[-1] else ()
            assert call('add', state, headed/n, *begin)[2] == ''
        assert call('export', state, '-o', tmp_path/f'{heads} too')[2] == ''
        for folder in (out, tmp_path/f'{heads} too'):
            got, kept = read_all(folder), read_all(headed/base)
            assert_close({k.removeprefix('bert.'): v for k, v in got.items() if k.removeprefix('bert.') in shared}, want)
            alone = {k: v for k, v in kept.items() if k.removeprefix('bert.') not in shared}
            if heads == 'keep': alone = {k: v for k, v in alone.items() if not k.startswith('classifier')}
            assert_close({k: v for k, v in got.items() if k.removeprefix('bert.') not in shared}, alone, rtol=0, atol=0)
            files = sorted(p.stem for p in (folder/'heads').glob('*'))
            assert files == (sorted(with_head) if heads == 'keep' else [])
            for n in files: assert_close(load_file(folder/'heads'/f'{n}.safetensors'), {
                k: v for k, v in read_all(headed/n).items() if k.startswith(('classifier', 'qa'))}, rtol=0, atol=0)
            assert verify(folder) == len(got) + 2 * len(files)
    said = json.loads((tmp_path/'base'/'fusion.json').read_text())
    assert [i['name'] for i in said['inputs'] if 'left_out' in i] == with_head
    assert 'would refuse' not in call('inspect', headed/base, *(headed/n for n in experts), '-m', 'soft_soup')[1]


@pytest.mark.parametrize('base', ['bare', 'words']) # without the prefix of the experts, and with it
def test_a_pooler_goes_with_its_head(headed, tmp_path, base):
    "Where the base has no pooler: kept with the head it feeds, or left out and said so; at once as one by one."
    experts, top = ['labels3', 'labels4'], ('classifier', 'pooler')
    plain = lambda n: {k.removeprefix('bert.'): v for k, v in read_all(headed/n).items() if not k.startswith('cls')}
    body = lambda n: {k: v for k, v in plain(n).items() if not k.startswith(top)}
    want = fuse(body(base), [body(n) for n in experts], 'soft_soup')
    for heads in ('keep', 'base'):
        outs = [tmp_path/heads, tmp_path/f'{heads} too']
        models = headed/base, *(headed/n for n in experts)
        assert call('fuse', *models, '-m', 'soft_soup', '-o', outs[0], '--heads', heads)[2] == ''
        for n in experts:
            begin = ('--base', headed/base, '-m', 'soft_soup', '--heads', heads) if n == experts[0] else ()
            assert call('add', tmp_path/f'state {heads}', headed/n, *begin)[2] == ''
        assert call('export', tmp_path/f'state {heads}', '-o', outs[1])[2] == ''
        for out in outs:
            got = {k.removeprefix('bert.'): v for k, v in read_all(out).items() if not k.startswith('cls')}
            assert_close(got, want)
            said = [i.get('left_out', []) for i in json.loads((out/'fusion.json').read_text())['inputs']]
            if heads == 'base': assert not said[0] and all(len([k for k in x if 'pooler' in k]) == 2 for x in said[1:])
            if heads == 'base': assert 'pooler.dense.bias' in (out/'README.md').read_text()
            for n in experts if heads == 'keep' else []:
                folder = attach_head(out, out/'heads'/f'{n}.safetensors', tmp_path/f'{out.name} {n}')
                model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
                assert not info['missing_keys'] and all(k.startswith('cls') for k in info['unexpected_keys'])
                state = {k.removeprefix('bert.'): v for k, v in model.state_dict().items()}
                assert_close({k: state[k] for k in plain(n)}, want | {k: v for k, v in plain(n).items() if k.startswith(top)})
    assert call('remove', tmp_path/'state base', headed/'labels3')[2] == ''
    assert 'would refuse' not in call('inspect', headed/base, *(headed/n for n in experts), '-m', 'soft_soup')[1]


BESIDE = dict( # class → configuration; what lies beside its body
    PoolFormerForImageClassification=(dict(
        hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]),
        {'norm', 'classifier'}),
    CvtForImageClassification=(dict(
        embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3], mlp_ratio=[2.] * 3), {'layernorm', 'classifier'}),
    TapasForQuestionAnswering=(text | dict(num_aggregation_labels=4), {
        'output_weights', 'output_bias', 'column_output_weights', 'column_output_bias', 'aggregation_classifier'}),
    ViTForMaskedImageModeling=(vision, {'decoder'}),
    SegformerForSemanticSegmentation=(dict(
        num_encoder_blocks=2, hidden_sizes=[8, 16], depths=[1, 1], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8), {'decode_head'}))


@pytest.mark.parametrize('name', BESIDE)
def test_what_lies_beside_a_body_goes_with_its_head(tmp_path, name):
    "A last norm, a painter of patches, a table of weights: none of it is the body's, whatever it is called."
    cls, (settings, beside) = getattr(transformers, name), BESIDE[name]
    config = cls.config_class(**settings)
    for t in range(3):
        torch.manual_seed(0)
        model, g = cls(config), torch.Generator().manual_seed(t)
        for p in model.parameters(): p.data += .05 * torch.randn(p.shape, generator=g)
        (model if t else getattr(model, prefix := cls.base_model_prefix)).save_pretrained(tmp_path/f'm{t}')
    plain = lambda n: {k.removeprefix(prefix + '.'): v for k, v in read_all(tmp_path/n).items()}
    heads, ms = {n: {k: v for k, v in plain(n).items() if k.split('.')[0] in beside} for n in ('m1', 'm2')}, ('m0', 'm1', 'm2')
    assert {k.split('.')[0] for k in heads['m1']} == beside
    first, *others = ({k: v for k, v in plain(n).items() if k.split('.')[0] not in beside} for n in ms)
    want = fuse(first, others, 'soft_soup')
    assert call('fuse', *(tmp_path/n for n in ms), '-m', 'soft_soup', '-o', tmp_path/'keep', '--heads', 'keep')[2] == ''
    assert call('add', tmp_path/'state', tmp_path/'m1', '--base', tmp_path/'m0', '-m', 'soft_soup', '--heads', 'keep')[2] == ''
    assert call('add', tmp_path/'state', tmp_path/'m2')[2] == call('export', tmp_path/'state', '-o', tmp_path/'too')[2] == ''
    for out in ('keep', 'too'):
        assert_close(read_all(tmp_path/out), want)
        for n, head in heads.items():
            folder = attach_head(tmp_path/out, tmp_path/out/'heads'/f'{n}.safetensors', tmp_path/f'{out} {n}')
            model, info = cls.from_pretrained(folder, output_loading_info=True)
            assert not info['missing_keys'] and not info['unexpected_keys']
            model.save_pretrained(tmp_path/'again')
            assert_close(plain('again'), want | head)
    assert call('fuse', *(tmp_path/n for n in ms), '-m', 'soft_soup', '-o', tmp_path/'base', '--heads', 'base')[2] == ''
    left = [i.get('left_out', []) for i in json.loads((tmp_path/'base'/'fusion.json').read_text())['inputs']]
    assert list(map(sorted, left)) == [[], sorted(heads['m1']), sorted(heads['m2'])]
    state = read_all(tmp_path/'m2') | {f'{prefix}.more': torch.ones(2)}
    save_file(state, tmp_path/'m2'/'model.safetensors', {'format': 'pt'})
    experts = [tmp_path/'m1', tmp_path/'m2']
    refused(f"has '{prefix}.more', which the base lacks", tmp_path/'m0', experts, 'soft_soup', tmp_path/'no', heads='keep')


def test_heads_that_cannot_be_told_apart(headed, tmp_path):
    "Nothing is cut: a pooler without a head that the base lacks, unequal labels, a head that has no labels."
    for args in [dict(), dict(heads='keep')]:
        refused("pooler.dense.weight', which the base lacks; choose a base that has a place for it", headed/'bare',
                [headed/'body1'], 'dora', tmp_path/'fused', **args)
    for heads in ('refuse', 'fuse'):
        args = [*map(str, (headed/'labels2', headed/'labels3', headed/'labels4'))], ['--heads', heads] * (heads == 'fuse')
        code, _, err = call('fuse', *args[0], '-o', tmp_path/'fused', *args[1])
        assert code == 2 and ('union' if heads == 'fuse' else 'keep') in err and err.count('\n') == 1
    code, _, err = call('fuse', *args[0], '-o', tmp_path/'union', '--heads', 'fuse', '--labels', 'union')
    assert (code, err) == (0, '') and len(json.loads((tmp_path/'union'/'config.json').read_text())['id2label']) == 9
    bad = tmp_path/'bad'
    AutoModelForSequenceClassification.from_pretrained(headed/'labels3').save_pretrained(bad)
    (bad/'config.json').write_text((headed/'labels4'/'config.json').read_text())
    before = sorted(os.listdir(tmp_path))
    refused('one head weight with 4 rows per label', headed/'body', [bad], 'dora', tmp_path/'fused', heads='keep')
    assert call('add', tmp_path/'state', bad, '--base', headed/'body', '--heads', 'keep')[0] == 2
    assert sorted(os.listdir(tmp_path)) == before


# Heads of language models

HEAD, DECODER = 'cls.predictions.transform.dense.weight', 'cls.predictions.decoder'
TABLE = 'bert.embeddings.word_embeddings.weight'


@pytest.fixture(scope='session')
def words(tmp_path_factory):
    "One BERT, moved: masked language models (`old`: with the tied layer in the file; `free`: untied), bodies, classifiers."
    root = tmp_path_factory.mktemp('words')
    classes = dict(tied='BertForMaskedLM', free='BertForMaskedLM', body='BertModel', both='BertForPreTraining',
                   label='BertForSequenceClassification')
    for kind, cls in classes.items():
        for t in range(3):
            torch.manual_seed(0)
            model = getattr(transformers, cls)(BertConfig(**text, tie_word_embeddings=kind != 'free'))
            g = torch.Generator().manual_seed(100 * len(kind) + t)
            for p in model.parameters(): p.data += .05 * torch.randn(p.shape, generator=g)
            model.save_pretrained(root/f'{kind}{t}')
    for t in range(3):
        AutoModelForMaskedLM.from_pretrained(root/f'tied{t}').save_pretrained(root/f'old{t}')
        state = read_all(root/f'tied{t}')
        more = {f'{DECODER}.weight': state[TABLE].clone(), f'{DECODER}.bias': state['cls.predictions.bias'].clone()}
        save_file(state | more, root/f'old{t}'/'model.safetensors', {'format': 'pt'})
    return root


def masked(folder): # a masked language model that lacks nothing, and its answer
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and all('pooler' in k or 'seq_rel' in k for k in info['unexpected_keys'])
    return model.state_dict(), answer(model.eval(), IDS)


def ways(tmp_path, base, experts, heads): # the fusion at once, and one by one
    outs = [tmp_path/f'{base.name} {experts[0].name} {heads}{n}' for n in ('', ' too')]
    given = ('-m', 'soft_soup', *(('--heads', heads) if heads != 'refuse' else ()))
    assert call('fuse', base, *experts, *given, '-o', outs[0])[2] == ''
    for e in experts:
        begin = ('--base', base, *given) if e == experts[0] else ()
        assert call('add', f'{outs[0]} state', e, *begin)[2] == ''
    assert call('export', f'{outs[0]} state', '-o', outs[1])[2] == ''
    return outs


@pytest.mark.parametrize('base, experts', [('tied0', ['tied1', 'tied2']), ('tied0', ['old1', 'old2']),
                                           ('old0', ['tied1', 'old2']), ('old0', ['old1', 'tied2']),
                                           ('free0', ['free1', 'free2'])])
@pytest.mark.parametrize('heads', ['base', 'keep'])
def test_language_heads_that_all_have_are_fused(words, tmp_path, base, experts, heads):
    "As in memory, the tied layer once; whatever is said of task heads, which these are not."
    first, *others = (AutoModelForMaskedLM.from_pretrained(words/n) for n in (base, *experts))
    want = fuse(first.state_dict(), [e.state_dict() for e in others], 'soft_soup')
    first.load_state_dict(want)
    for out in ways(tmp_path, words/base, [words/n for n in experts], heads):
        state, logits = masked(out)
        assert_close(state, want)
        assert_close(logits, answer(first.eval(), IDS), rtol=1e-4, atol=1e-5)
        assert not (out/'heads').exists() and 'left_out' not in (out/'fusion.json').read_text()
        assert not torch.equal(state[HEAD], read_all(words/base)[HEAD])


@pytest.mark.parametrize('base, experts', [('body0', ['old1', 'tied2']), ('body0', ['free1', 'free2']),
                                           ('body0', ['tied2', 'both1']), ('label0', ['tied1', 'old2'])])
def test_language_heads_that_the_base_lacks(words, tmp_path, base, experts):
    "Left out and named, or kept in files from which a language model is made again, its tied layer that of the fused table."
    def plain(n): return {k.removeprefix('bert.'): v for k, v in read_all(words/n).items()}
    states = [plain(n) for n in (base, *experts)]
    shared = [k for k in states[0] if all(k in s for s in states) and not k.startswith('cls')]
    first, *others = ({k: s[k] for k in shared} for s in states)
    want = fuse(first, others, 'soft_soup')
    for heads in ('base', 'keep'):
        for out in ways(tmp_path, words/base, [words/n for n in experts], heads):
            got = {k.removeprefix('bert.'): v for k, v in read_all(out).items()}
            assert_close({k: got[k] for k in shared}, want)
            assert not any(k.startswith('cls') for k in got)
            gone = [i.get('left_out', []) for i in json.loads((out/'fusion.json').read_text())['inputs'][1:]]
            assert all((HEAD in x) == (heads == 'base') for x in gone)
            assert all((f'{DECODER}.weight' in x) == (heads == 'base' and 'free1' in experts) for x in gone)
            if heads == 'base': assert 'cls.predictions' in (out/'README.md').read_text()
            for n in experts if heads == 'keep' else []:
                state, _ = masked(attach_head(out, out/'heads'/f'{n}.safetensors', tmp_path/f'{out.name} {n}'))
                own = AutoModelForMaskedLM.from_pretrained(words/n).state_dict()
                head = {k: v for k, v in own.items() if k.startswith('cls')}
                if 'free' not in n: head[f'{DECODER}.weight'] = state[TABLE]
                assert_close({k: state[k] for k in head}, head, rtol=0, atol=0)
                assert_close(state[TABLE], want['embeddings.word_embeddings.weight'])
            assert verify(out) >= len(got)
    assert 'would refuse' not in call('inspect', words/base, *(words/n for n in experts), '-m', 'soft_soup')[1]


def test_language_heads_that_do_not_fit(words, tmp_path):
    "Named with what helps, and what helps does."
    for base, expert, args, says in [
            ('body0', 'tied1', {}, "lacks 'pooler.dense.bias', 'pooler.dense.weight', which the base has; leave the base's"),
            ('tied0', 'body1', {}, "transform.LayerNorm.weight' and 2 more, which the base has; leave the base's as it is"),
            ('body0', 'tied1', dict(heads='fuse'), "which the base lacks; choose a base that has a place for it, or leave it"),
            ('tied0', 'body1', dict(heads='keep'), "pooler.dense.weight', which the base lacks; choose a base that has a"),
            *((b, e, dict(heads=h), 'one ties its output layer to its input table, one does not: fuse models that tie and')
              for b, e in [('tied0', 'free1'), ('free0', 'tied1')] for h in ('refuse', 'base', 'keep'))]:
        refused(says, words/base, [words/expert], 'soft_soup', tmp_path/'fused', **args)


def test_language_heads_have_a_row_per_token(words, tmp_path):
    "Kept apart, such a head cannot follow when the fused model's rows change; left out, it need not."
    from tokenizers import Tokenizer, models as kinds
    ids = {f'w{i}': i for i in range(text['vocab_size'])}
    def known(name, added):
        model = AutoModel.from_pretrained(words/name) if 'body' in name else AutoModelForMaskedLM.from_pretrained(words/name)
        tok = Tokenizer(kinds.WordLevel(ids, unk_token='w0'))
        tok.add_tokens(added)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tok).save_pretrained(tmp_path/name)
        model.resize_token_embeddings(len(ids) + len(added), mean_resizing=False)
        model.save_pretrained(tmp_path/name)
        return tmp_path/name
    base, more = known('body0', []), known('tied1', ['<new>'])
    refused(["tied1: its head, 'cls.predictions.", "tokens='union'", "leave it out with heads='base'"], base, [more], 'soft_soup',
            tmp_path/'fused', heads='keep', tokens='union')
    begin = 'add', tmp_path/'state', more, '--base', base, '-m', 'soft_soup', '--tokens', 'base', '--heads'
    code, _, err = call(*begin, 'keep')
    assert code == 2 and "has a row per token, and tokens='base' changes rows; leave it out with heads='base'" in err
    assert call(*begin, 'base')[2] == '' and not (tmp_path/'state'/'heads').exists()
    for tokens in ('base', 'union'):
        assert call('fuse', base, more, '-m', 'soft_soup', '--heads', 'base', '--tokens', tokens, '-o', tmp_path/tokens)[2] == ''
        assert len(read_all(tmp_path/tokens)['embeddings.word_embeddings.weight']) == len(ids) + (tokens == 'union')


# Layers below a head

SOUND = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=37,
             classifier_proj_size=6, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2, use_weighted_layer_sum=True)
WAVE = dict(input_values=torch.linspace(-1, 1, 800).reshape(2, 400).sin())
LAYERED = dict( # name → (class, configuration, what it is asked, what lies below its head, and is no part of the bare model)
    distilbert=('DistilBertForSequenceClassification', 'DistilBertConfig', dict(vocab_size=37, dim=16, n_layers=2, n_heads=2,
                hidden_dim=24, max_position_embeddings=20), IDS, ['pre_classifier.weight']),
    roberta=('RobertaForSequenceClassification', 'RobertaConfig', text, IDS, ['classifier.dense.weight']),
    modernbert=('ModernBertForSequenceClassification', 'ModernBertConfig',
                text | special | dict(cls_token_id=0, sep_token_id=1), IDS, ['head.dense.weight', 'head.norm.weight']),
    xlnet=('XLNetForSequenceClassification', 'XLNetConfig', dict(vocab_size=37, d_model=16, n_layer=2, n_head=2, d_inner=24), IDS,
           ['sequence_summary.summary.weight']),
    electra=('ElectraForMultipleChoice', 'ElectraConfig', text | dict(embedding_size=16), {k: v[None] for k, v in IDS.items()},
             ['sequence_summary.summary.weight']),
    eurobert=('EuroBertForSequenceClassification', 'EuroBertConfig',
              text | special | dict(num_key_value_heads=1, mask_token_id=2), IDS, ['dense.weight']),
    wav2vec2=('Wav2Vec2ForSequenceClassification', 'Wav2Vec2Config', SOUND, WAVE, ['projector.weight', 'layer_weights']))


@pytest.mark.parametrize('name', LAYERED)
def test_layers_below_a_head_go_with_it(tmp_path, name):
    "Left out and named, or kept with the head that they feed: on the fused body it answers as the same put together by hand."
    cls, config, size, asked, below = LAYERED[name]
    cls, config, experts = getattr(transformers, cls), getattr(transformers, config), {}
    def write(n, labels, seed):
        torch.manual_seed(0)
        model, g = cls(config(**size, **labels)).eval(), torch.Generator().manual_seed(seed)
        for p in model.parameters(): p.data += .05 * torch.randn(p.shape, generator=g)
        model.save_pretrained(tmp_path/n)
        return model
    for t, n in enumerate(('one', 'two'), 2):
        names = {f'{n}{i}': i for i in range(t)}
        labels = dict(id2label={i: x for x, i in names.items()}, label2id=names)
        experts[n] = write(n, {} if 'Choice' in cls.__name__ else labels, t)
    base = write('base', {}, 1).base_model
    base.save_pretrained(tmp_path/'base')
    assert not [k for k in below if k in base.state_dict()] and all(k in read_all(tmp_path/'one') for k in below)
    states = [e.base_model.state_dict() for e in experts.values()]
    want = fuse(base.state_dict(), states, 'soft_soup')
    for heads in ('base', 'keep'):
        for out in ways(tmp_path, tmp_path/'base', [tmp_path/n for n in experts], heads):
            assert_close(read_all(out), {k: want[k] for k in read_all(tmp_path/'base')})
            gone = [i.get('left_out', []) for i in json.loads((out/'fusion.json').read_text())['inputs'][1:]]
            assert all((k in x) == (heads == 'base') for k in below for x in gone)
            for n, e in experts.items() if heads == 'keep' else ():
                model, info = cls.from_pretrained(attach_head(out, out/'heads'/f'{n}.safetensors', tmp_path/f'{out.name} {n}'),
                                                  output_loading_info=True)
                assert not info['missing_keys'] and not info['unexpected_keys']
                e.base_model.load_state_dict(want)
                assert_close(answer(model.eval(), asked), answer(e, asked), rtol=1e-4, atol=1e-5)
                assert model.config.id2label == e.config.id2label or 'Choice' in cls.__name__
    assert 'would refuse' not in call('inspect', tmp_path/'base', tmp_path/'one', '-m', 'soft_soup')[1]
    assert call('fuse', tmp_path/'one', tmp_path/'base', '-m', 'soft_soup', '-o', tmp_path/'turned', '--heads', 'base')[2] == ''
    got, kept = read_all(tmp_path/'turned'), read_all(tmp_path/'one') # a base that has what an expert lacks
    assert_close({k: got[k] for k in below}, {k: kept[k] for k in below}, rtol=0, atol=0)


# Labels and tokens

def test_labels_of_the_base_or_of_all(tmp_path):
    "Rows by label against a loop over names in float64; what the fused head lacks is said; nothing is left of an empty set."
    labels = dict(base=['no', 'yes', 'off'], one=['yes', 'no', 'maybe'], two=['off', 'yes'], far=['x', 'y'])
    for t, (n, names) in enumerate(labels.items()):
        torch.manual_seed(t)
        config = BertConfig(**text, id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)})
        BertForSequenceClassification(config).save_pretrained(tmp_path/n)
    table = lambda n: read_all(tmp_path/n)['classifier.weight'].double()
    row = lambda n, x: table(n)[labels[n].index(x)] if x in labels[n] else row('base', x)
    for mode, kept, gone in [('base', labels['base'], [None, ['maybe'], None]),
                             ('intersection', ['yes'], [['no', 'off'], ['no', 'maybe'], ['off']])]:
        out = tmp_path/f'by {mode}'
        code, _, err = call('fuse', *(tmp_path/n for n in ('base', 'one', 'two')), '-m', 'soft_soup', '--heads', 'fuse',
                            '--labels', mode, '-o', out)
        assert code == 0 and not err, err
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert list(model.config.id2label.values()) == kept
        want = torch.stack([(row('one', x) + row('two', x)) / 2 for x in kept])
        assert_close(model.classifier.weight.double(), want, rtol=0, atol=1e-7)
        assert [i.get('labels_left_out') for i in json.loads((out/'fusion.json').read_text())['inputs']] == gone
        assert 'maybe of one' in (out/'README.md').read_text() and verify(out)
    for mode, says in [('base', 'has none of the labels'), ('intersection', 'no label is shared by all')]:
        code, _, err = call('fuse', tmp_path/'base', tmp_path/'far', '--heads', 'fuse', '--labels', mode, '-o', tmp_path/'no')
        assert code == 2 and says in err and err.count('\n') == 1 and not (tmp_path/'no').exists()


def test_tokens_of_all_experts(tmp_path, monkeypatch):
    "Two experts that added a token each, at the same place: the fused model and its tokenizer know both."
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    words = ['<unk>', '<pad>', 'the', 'cat', 'sat']
    def write(folder, added, seed):
        tok = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tok.add_tokens(added)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', pad_token='<pad>').save_pretrained(folder)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**text | special | dict(vocab_size=len(words)))
        model = transformers.LlamaForCausalLM(config)
        model.resize_token_embeddings(len(words) + len(added), mean_resizing=False)
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters(): p.data += .05 * bool(seed) * torch.randn(p.shape, generator=g)
        model.save_pretrained(folder)
        return model.state_dict()
    states = [write(tmp_path/f, added, t) for t, (f, added) in
              enumerate([('base', []), ('tool', ['<tool>']), ('think', ['<think>'])])]
    refused(['tool', '<tool>'], tmp_path/'base', [tmp_path/'tool', tmp_path/'think'], 'soft_soup', tmp_path/'fused')
    code, _, err = call('fuse', tmp_path/'base', tmp_path/'tool', tmp_path/'think', '-m', 'soft_soup', '-o', tmp_path/'fused',
                        '--tokens', 'union')
    assert code == 0, err
    tok, model = AutoTokenizer.from_pretrained(tmp_path/'fused'), load('llama', tmp_path/'fused')
    assert tok('the cat <think> <tool> sat').input_ids == [2, 3, 6, 5, 4] and model.config.vocab_size == len(tok) == 7
    table, (_, tool, think) = model.state_dict()['model.embed_tokens.weight'], (s['model.embed_tokens.weight'] for s in states)
    assert_close(table, torch.cat([(tool[:5] + think[:5]) / 2, tool[5:], think[5:]])) # each row by those that have it
    with torch.no_grad(): assert model(torch.tensor([[2, 6, 5]])).logits.shape == (1, 3, 7)
    monkeypatch.chdir(tmp_path)                                   # a living fusion keeps the base's rows, and says what helps
    code, _, err = call('add', 'state', 'tool', '--base', 'base', '-m', 'soft_soup')
    assert code == 2 and 'tool has other tokens than the base' in err
    assert '`direction-fusion fuse BASE EXPERTS --tokens union`' in err and 'add it with `--tokens base`' in err
    assert call('add', 'state', 'tool', '--base', 'base', '-m', 'soft_soup', '--tokens', 'base')[2] == ''
    assert call('add', 'state', 'think', '--tokens', 'base')[2] == ''
    assert call('export', 'state', '-o', 'alive')[2] == ''
    assert call('fuse', 'base', 'tool', 'think', '-m', 'soft_soup', '-o', 'at once', '--tokens', 'base')[2] == ''
    assert_close(read_all('alive'), read_all('at once'))
    assert_close(read_all('alive')['model.embed_tokens.weight'], (tool[:5] + think[:5]) / 2)
    assert AutoTokenizer.from_pretrained('alive').get_vocab() == AutoTokenizer.from_pretrained('base').get_vocab()
    assert json.loads((tmp_path/'alive'/'fusion.json').read_text())['recipe']['tokenizer'] == 'base'
    assert 'rows that the base lacks left out: tool, think.' in (tmp_path/'alive'/'README.md').read_text()
    assert call('remove', 'state', 'tool')[2] == '' and call('export', 'state', '-o', 'left')[2] == ''
    assert_close(read_all('left')['model.embed_tokens.weight'], think[:5])
    code, _, err = call('add', 'state', 'tool', '--tokens', 'union')
    assert code == 2 and "`tokens` must be agree or base, got 'union'" in err


# A living fusion

@pytest.mark.parametrize('method', ['dora', 'opcm'])
def test_add_and_export_give_what_fuse_gives(models, tmp_path, method, monkeypatch):
    folder, state, out = models('gpt2'), tmp_path/'state', tmp_path/'fused'
    code, _, err = call('add', state, folder/'expert1')
    assert (code, err) == (2, f'direction-fusion: {state} holds no fusion yet: the first expert needs `base`\n')
    for t in (1, 2, 3):
        begin = ('--base', folder/'base', '-m', method) if t == 1 else ()
        code, said, err = call('add', state, folder/f'expert{t}', *begin)
        assert code == 0 and ', '.join(f'expert{i}' for i in range(1, t + 1)) in said, err
    assert call('export', state, '-o', out)[0] == 0
    fuse_checkpoints(folder/'base', experts_of(folder), method, tmp_path/'at once')
    assert_close(read_all(out), read_all(tmp_path/'at once'), rtol=1e-5, atol=1e-6)
    load('gpt2', out)
    assert verify(out) == len(read_all(out)) # every tensor has its digest
    recipe = json.loads((out/'fusion.json').read_text())['recipe']
    assert recipe == dict(method=method, base='base', experts=[f'expert{t}' for t in (1, 2, 3)],
                          parameters=recipe['parameters'])
    assert yaml.safe_load((out/'README.md').read_text().split('```')[1].removeprefix('yaml')) == recipe
    monkeypatch.chdir(folder)
    fuse_checkpoints(recipe['base'], recipe['experts'], recipe['method'], tmp_path/'from recipe', **recipe['parameters'])
    assert_close(read_all(tmp_path/'from recipe'), read_all(out), rtol=1e-5, atol=1e-6)
    assert call('export', state, '-o', tmp_path/'thin', '--adapter-rank', 3)[0] == 0
    fuse_checkpoints(folder/'base', experts_of(folder), method, tmp_path/'thin too', adapter_rank=3)
    thin, same = (open_expert(tmp_path/n, open_checkpoint(folder/'base')) for n in ('thin', 'thin too'))
    assert_close(dict(thin), dict(same), rtol=1e-4, atol=1e-5)
    made = json.loads((tmp_path/'thin'/'fusion.json').read_text())
    assert made['recipe'] == recipe | dict(adapter_rank=3)
    assert verify(tmp_path/'thin') == len(made['outputs'])
    other = 'was made with a base of fingerprint'
    gone = 'is not in this fusion' if method == 'dora' else 'cannot take an expert out'
    for args, says in [(('add', state, folder/'expert1'), 'has been added already'),
                       (('add', state, folder/'expert1', '--name', 'again'), 'added already'),
                       (('add', state, folder/'expert3', '--name', 'x', '--base', folder/'expert2'), other),
                       (('export', state, '-o', tmp_path/'no', '--base', folder/'expert2'), other),
                       (('export', tmp_path/'none', '-o', tmp_path/'no'), 'holds no fusion'),
                       (('remove', state, folder/'expert1', '--name', 'expert9'), gone)]:
        before = files_in(state)
        code, _, err = call(*args)
        assert code == 2 and says in err and err.count('\n') == 1, err
        assert files_in(state) == before and not (tmp_path/'no').exists()
    if method == 'opcm': return
    assert call('remove', state, folder/'expert2')[0] == 0
    assert call('export', state, '-o', out, '--overwrite')[0] == 0
    fuse_checkpoints(folder/'base', [folder/'expert1', folder/'expert3'], method, tmp_path/'two')
    assert_close(read_all(out), read_all(tmp_path/'two'), rtol=1e-4, atol=1e-6)


def test_living_fusion_broken_off_stays_as_it_was(models, tmp_path, monkeypatch):
    from direction_fusion.living import STATE, add_expert
    folder, state = models('bert'), tmp_path/'state'
    add_expert(state, folder/'expert1', folder/'base')
    before = (state/STATE).read_bytes()
    def stop(done, total):
        if done > total / 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): add_expert(state, folder/'expert2', advance=stop)
    assert files_in(state) == {STATE: before, '.lock': b''}
    assert add_expert(state, folder/'expert2')['names'] == ['expert1', 'expert2']


def test_adapters_join_a_living_fusion(adapted, tmp_path):
    from direction_fusion.living import add_expert, export_fusion
    base, loras, _ = adapted
    add_expert(tmp_path/'state', loras[0], base, 'dora')
    assert add_expert(tmp_path/'state', loras[1])['names'] == ['lora1', 'lora2']
    export_fusion(tmp_path/'state', tmp_path/'fused')
    fuse_checkpoints(base, loras, 'dora', tmp_path/'at once')
    assert_close(read_all(tmp_path/'fused'), read_all(tmp_path/'at once'), rtol=1e-5, atol=1e-6)
