"""mergekit's recipes give mergekit's numbers: ours against what it wrote for tiny random models (tests/golden/recipes.py)."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from direction_fusion.fusion import merge_deltas
from direction_fusion.methods import METHODS
from direction_fusion.recipes import PEERS, layer_counts, parse_yaml, read_recipe, stack_of

GOLDEN = Path(__file__).parent/'golden'
spec = importlib.util.spec_from_file_location('golden_recipes', GOLDEN/'recipes.py')
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden) # the recipes, and the models drawn from a seed

with np.load(GOLDEN/'recipes.npz') as f:
    ABOUT = json.loads(str(f['about']))
    WANT = {k.split()[0]: (getattr(torch, k.split()[1]), torch.from_numpy(f[k])) for k in f.files if k != 'about'}

def state(source): return {k: torch.from_numpy(v) for k, v in golden.model(source).items()}


def ours(recipe, base, experts): # state dicts (base None: zero) → the fused state dict
    first, plan = experts[0], recipe.plan(experts[0])
    read = getattr(torch, recipe.dtype or str(next(iter(first.values())).dtype).removeprefix('torch.'))
    write, out, m = getattr(torch, recipe.out_dtype or recipe.dtype or 'float32'), {}, METHODS[recipe.method]
    for k, (params, weights) in plan.items():
        wide = [e[k].to(read).double() for e in experts]
        b = torch.zeros_like(wide[0]) if base is None else base[k].to(read).double()
        out[k] = (b + merge_deltas(m, params, k, torch.stack(wide) - b, b, 'linear', weights, recipe.seed)).to(write)
    return out


def read(name): return read_recipe(parse_yaml(golden.RECIPES[name])) # the recipe of a golden case


def test_every_recipe_was_run_and_every_method_has_one():
    assert golden.RECIPES.keys() == WANT.keys() and ABOUT['mergekit'] == '0.1.5'
    assert {parse_yaml(t)['merge_method'] for t in golden.RECIPES.values()} == PEERS.keys()


@pytest.mark.parametrize('name', golden.RECIPES)
def test_gives_mergekits_numbers(name):
    recipe, (dtype, want) = read(name), WANT[name]
    got = ours(recipe, recipe.base and state(recipe.base), [state(e) for e in recipe.experts])
    ks = golden.kept(recipe.experts[0].split('-')[0])
    assert {got[k].dtype for k in ks} == {dtype}
    got = torch.cat([got[k].flatten() for k in ks])
    if dtype in (torch.bfloat16, torch.float16): # one rounding of ours, two of a peer that computes in float32
        assert (got.float() == want).double().mean() > .98
        assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=0)
    else: assert_close(got.float(), want, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize('name', golden.RECIPES)
def test_our_form_says_the_same(name):
    recipe = read(name)
    again = read_recipe(parse_yaml(recipe.to_yaml()))
    assert again == recipe and (again.format, recipe.format) == ('own', 'mergekit')
    ks = golden.shapes(recipe.experts[0].split('-')[0])
    assert again.plan(ks) == recipe.plan(ks)


def test_a_change_of_the_recipe_is_noticed(): # that the comparison above can fail
    for name, old, new in [('slerp', 'self_attn', 'no_such'), ('linear_sum', 'layers.1', 'layers.2'), ('ties', 'lambda: 0.8', 'lambda: 0.7'),
                           ('slerp_slices', '[0.3, 0.5]', '[0.3, 0.6]'), ('t5', '[1, 0, 1]', '[1, 1]')]:
        assert old in golden.RECIPES[name]
        r = read_recipe(parse_yaml(golden.RECIPES[name].replace(old, new)))
        got = ours(r, r.base and state(r.base), [state(e) for e in r.experts])
        got = torch.cat([got[k].flatten() for k in golden.kept(r.experts[0].split('-')[0])]).float()
        assert (got - WANT[name][1]).abs().max() > 1e-3, name


@pytest.mark.parametrize('kind', golden.CONFIGS)
def test_layers_are_found_by_name(kind):
    config = golden.CONFIGS[kind]
    counts = layer_counts(golden.shapes(kind))
    if kind == 't5': assert counts == {'encoder.block': config['num_layers'], 'decoder.block': config['num_decoder_layers']}
    else: assert list(counts.values()) == [config['num_hidden_layers']]
    outside = {k for k in golden.shapes(kind) if stack_of(k) is None}
    assert outside and all('embed' in k or 'norm' in k or 'pooler' in k or k.startswith(('lm_head', 'classifier', 'shared')) for k in outside)


def test_random_methods_drop_as_mergekits_do():
    "The numbers that decide the draws; that the draws have the same distribution is tested with mergekit's own draws elsewhere."
    text = golden.RECIPES['della_linear'].replace('density: 1}', 'density: [0.4, 0.6], rescale: false}')
    params, _ = read_recipe(parse_yaml(text)).at('model.layers.2.x.weight', 2, 4)
    want = dict(p=1 - (.4 + .2 * 2 / 3), epsilon=.4, lam=1., grain='row', rescale='none', combine='sum')
    assert {n: pytest.approx(v) if isinstance(v, float) else v for n, v in want.items()} == {n: params[n] for n in want}
    params, _ = read_recipe(parse_yaml(golden.RECIPES['dare_ties'].replace('normalize: true', 'normalize: true, density: 0.3'))).at('x')
    assert (params['p'], params['rescale'], params['combine']) == (pytest.approx(.7), 'l1', 'ties')
