"""Our methods against what fusion-bench made of the same experts (tests/golden/fusion_bench.py wrote the file), in float64."""
import json
from math import prod
from pathlib import Path
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from direction_fusion.geometry import thin_svd
from direction_fusion.fusion import fuse
from direction_fusion.orthogonal import opcm_add
from direction_fusion.spectral import dop_add, knots_basis, svc

FILE = np.load(Path(__file__).with_name('golden') / 'fusion_bench.npz')
ABOUT = json.loads(str(FILE['about']))
close = lambda a, b: assert_close(a, b, rtol=1e-6, atol=1e-9)
LINEAR = 'up.weight', 'down.weight'


def golden(name): # state dict
    shapes, x = ABOUT['shapes'][name], torch.from_numpy(FILE[name])
    return dict(zip(shapes, (v.reshape(s) for v, s in zip(x.split([prod(s) for s in shapes.values()]), shapes.values()))))

BASE, EXPERTS = golden('base'), [golden(f'expert{i}') for i in range(3)]
TAUS = [{k: e[k] - BASE[k] for k in BASE} for e in EXPERTS]
deltas = lambda k: torch.stack([t[k] for t in TAUS])
far = lambda a, b: float((a - b).norm() / b.norm())
shift = lambda name, k: golden(name)[k] - BASE[k]


def test_file():
    assert ABOUT['versions']['fusion-bench'] == '0.2.33' and ABOUT['seeds'] == [0, 1, 2, 3]
    assert all(v.dtype == torch.float64 for v in BASE.values())


@pytest.mark.parametrize('name, golden_name, params', [
    ('tsv_m', 'tsv', {}), ('iso_c', 'iso_c', {}), ('iso_cts', 'iso_cts', dict(common=ABOUT['cts_common'])),
    ('wudi', 'wudi', {}),
    ('magmax', 'magmax', dict(lam=.5)), ('opcm', 'opcm', dict(alpha=ABOUT['opcm_alpha'], inclusive=False))])
def test_agrees(name, golden_name, params):
    merged = fuse(BASE, EXPERTS, name, **params)
    assert far(merged['up.weight'] - BASE['up.weight'], TAUS[0]['up.weight']) > .1 # it did something
    close(merged, golden(golden_name))


def test_opcm_protects_one_direction_more_than_the_release():
    "The paper protects the directions up to where the share of singular values crosses α, the release one fewer."
    ours, theirs = fuse(BASE, EXPERTS, 'opcm', alpha=.5), golden('opcm')
    assert .02 < max(far(ours[k] - BASE[k], theirs[k] - BASE[k]) for k in LINEAR) < .6
    M, D = deltas('up.weight')[:2]
    U, _, Vh = thin_svd(M)
    moved = U.T @ (opcm_add(dict(merged=M), D)['merged'] - M) @ Vh.T
    assert moved[0, 0].abs() < 1e-12


def test_wudi_started_from_the_sum():
    "300 steps of 1e-5 move a weight by at most 3e-3: the golden array is no trivial copy, and no far journey either."
    for k in LINEAR:
        moved = (shift('wudi', k) - deltas(k).sum(0)).abs().max()
        assert 1e-3 < moved <= 3.1e-3


@pytest.mark.parametrize('k', LINEAR)
def test_svc_agrees(k):
    close(svc(ABOUT['ta_lam'] * deltas(k).sum(0), deltas(k), ABOUT['svc_alpha']), shift('svc', k))
    close(fuse(BASE, EXPERTS, 'task_arithmetic_svc', lam=ABOUT['ta_lam'], svc_alpha=ABOUT['svc_alpha'])[k], golden('svc')[k])


@pytest.mark.parametrize('k', LINEAR)
def test_knots_agrees(k):
    """The aligned parts agree up to the free sign of each direction, which TIES does not see. Its top-k keeps the entry at the
    threshold and so one more than ⌊density·n⌋: with that many entries ours is the same, with ⌊density·n⌋ it differs."""
    U = knots_basis(deltas(k))
    for i, d in enumerate(deltas(k)):
        theirs = golden('knots_parts')[f'{k}.{i}']
        close((U.mT @ d).abs(), theirs.abs())
    n = prod(golden('knots_parts')[f'{k}.0'].shape)
    one_more = (int(ABOUT['knots_density'] * n) + 1.5) / n
    close(fuse(BASE, EXPERTS, 'knots', density=one_more)[k], golden('knots_ties')[k])
    assert .1 < far(fuse(BASE, EXPERTS, 'knots', density=ABOUT['knots_density'])[k] - BASE[k], shift('knots_ties', k)) < .6


@pytest.mark.parametrize('k', LINEAR)
def test_dop_is_where_the_optimiser_goes(k):
    "The release's loss with its cut of the spectrum, minimised to the end, gives the closed form."
    close(fuse(BASE, EXPERTS, 'dop', alpha=ABOUT['dop_alpha'], epsilon=.99999)[k], golden('dop_converged')[k])


def fold_dop(k, **kw):
    state = {}
    for d in deltas(k): state = dop_add(state, d, **kw)
    return state['merged']


@pytest.mark.parametrize('k', LINEAR)
def test_dop_as_published_stops_on_the_way(k):
    """200 steps of 1e-4 move a weight by about 0.02, so the release stays near its start, the pairwise mean, and far from the
    minimum. MGDA's weights change little against the fixed ones. The cut at ε costs a small matrix one whole direction."""
    start = (deltas(k)[0] / 2 + deltas(k)[1] / 2) / 2 + deltas(k)[2] / 2
    published, fixed, ours = shift('dop_published', k), shift('dop_fixed', k), fold_dop(k, epsilon=.99999)
    for theirs in (published, fixed):
        assert (theirs - start).abs().max() < .04
        assert .5 < far(ours, theirs) < 1.5
    assert far(published, fixed) < .05
    assert .01 < far(fold_dop(k), ours) < 1.


def test_dop_other_parameters_take_the_mean():
    "The release halves the weight of what came before with each expert, (θ₁/2 + θ₂/2)/2 + θ₃/2; ours take the mean of all."
    ours = fuse(BASE, EXPERTS, 'dop')
    for k in ('up.bias', 'ln.weight', 'ln.bias', 'down.bias'):
        a, b, c = (e[k] for e in EXPERTS)
        close(golden('dop_fixed')[k], (a + b) / 4 + c / 2)
        close(ours[k], (a + b + c) / 3)
