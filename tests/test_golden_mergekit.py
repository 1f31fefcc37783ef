"""Ours against arrays that mergekit wrote (tests/golden/mergekit.py): equal to 1e-6, or different on purpose, by how much and why."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from direction_fusion.soup import (karcher, model_stock, multislerp, nuslerp, slerp, soup_add, soup_merged, sum_add, sum_merged)
from direction_fusion.sparse import breadcrumbs, breadcrumbs_mask, dare, della, keep_probabilities, sce, ties

with np.load(Path(__file__).parent/'golden'/'mergekit.npz') as f:
    GOLDEN = {k: torch.from_numpy(f[k]) for k in f.files if k != 'about'}
    ABOUT = json.loads(str(f['about']))
SHAPES = ABOUT['shapes']
W, W2 = torch.tensor([1., 2., 3.]), torch.tensor([1., 3.])


def pieces(x): # flat vectors (…, 41) → tensors of every shape
    return [p.reshape(*x.shape[:-1], *s) for p, s in zip(x.split([int(np.prod(s)) for s in SHAPES], -1), SHAPES)]


def ours(rule, which='far', T=3): # a rule on every shape, flattened and joined as the golden arrays are
    return torch.cat([rule(d[:T], b).flatten() for d, b in zip(pieces(GOLDEN[f'deltas_{which}']), pieces(GOLDEN['base']))])


def folded(add, merged, ds, weights=(None,) * 3, **kw):
    state = {}
    for d, w in zip(ds, weights): state = add(state, d) if w is None else add(state, d, w)
    return merged(state, **kw)


def apart(a, b): # largest difference, relative to the largest entry
    return float((a - b).abs().max() / b.abs().max())


AGREE = {
    'linear': lambda d, b: folded(soup_add, soup_merged, d, W.tolist()),
    'task_arithmetic': lambda d, b: folded(sum_add, sum_merged, d, lam=.3),
    'slerp': lambda d, b: slerp(d[:2], b, .3),
    'nuslerp': lambda d, b: nuslerp(d[:2], b, W2),
    'nuslerp_rows': lambda d, b: nuslerp(d[:2], b, W2, grain='row'),
    'nuslerp_weights': lambda d, b: nuslerp(d[:2], b, W2, on='weight'),
    'multislerp': lambda d, b: multislerp(d, b, W),
    'multislerp_weights': lambda d, b: multislerp(d, b, W, on='weight'),
    'karcher': lambda d, b: karcher(d, b),
    'model_stock': lambda d, b: model_stock(d),
    'ties': lambda d, b: ties(d, density=.4, scope='tensor'),
    'ties_weights': lambda d, b: ties(d, W, density=.4, lam=.7, scope='tensor'),
    'breadcrumbs': lambda d, b: breadcrumbs(d, W, .4, .2),
    'breadcrumbs_full': lambda d, b: breadcrumbs(d, density=.9, gamma=.2, lam=1.),
    'breadcrumbs_ties': lambda d, b: breadcrumbs(d, density=.4, gamma=.2, combine='ties', lam=1.),
    'sce': lambda d, b: sce(d, .5),
    'sce_all': lambda d, b: sce(d, 1.),
}


def test_every_case_is_tested():
    differ = {'slerp_near', 'model_stock_rows', 'karcher_default', 'model_stock_near', 'sce_near'}
    random = {'dare', 'dare_l1', 'dare_ties_l1', 'della', 'della_l1'}
    assert set(ABOUT['cases']) == set(AGREE) | differ | random
    assert ABOUT['mergekit'] == '0.1.5'


@pytest.mark.parametrize('name', AGREE)
def test_agrees(name):
    got, want = ours(AGREE[name]), GOLDEN[name]
    assert got.dtype == torch.float64
    for x, y in zip(pieces(got), pieces(want)): assert apart(x, y) < 1e-6
    assert_close(got, want, rtol=1e-6, atol=1e-9) # the golden delta is a difference of weights of size 1


def test_the_inputs_disagree(): # else electing would be idle
    signs = GOLDEN['deltas_far'].sign()
    assert (signs != signs[0]).any(0).double().mean() > .3


# Different on purpose

def test_slerp_keeps_to_the_circle_where_mergekit_walks_straight():
    "mergekit interpolates linearly where the cosine of two weights exceeds 0.9995, as that of fine-tuned weights does."
    t, straight = .3, lambda d, b: .7 * d[0] + .3 * d[1]
    assert apart(ours(straight, 'near'), GOLDEN['slerp_near']) < 1e-6
    for d, b in zip(pieces(GOLDEN['deltas_near']), pieces(GOLDEN['base'])):
        u, v = (b + d[0]).flatten(), (b + d[1]).flatten()
        angle = 2 * torch.atan2((u / u.norm() - v / v.norm()).norm(), (u / u.norm() + v / v.norm()).norm())
        off = (slerp(d[:2], b, t) - straight(d, b)).norm() / b.norm()
        assert 0 < off <= 1.01 * angle**2 * t * (1 - t) / 2 # of the length of the weights; at most ω²/8


def test_karcher_converges_further_than_mergekit_by_default():
    "mergekit stops after 10 iterations or at a step of 1e-5; ours goes on to the precision of float64."
    assert 1e-12 < apart(ours(AGREE['karcher']), GOLDEN['karcher_default']) < 1e-3


def test_model_stock_by_rows():
    "Rows with a positive mean cosine agree; where it is negative ours stays at the base (below)."
    opposed = 0
    for d, want in zip(pieces(GOLDEN['deltas_far']), pieces(GOLDEN['model_stock_rows'])):
        rows = d if d.ndim == 3 else d[:, None]
        unit = rows / rows.norm(dim=2, keepdim=True)
        c = sum((unit[s] * unit[t]).sum(1) for s, t in [(0, 1), (0, 2), (1, 2)]) / 3
        got, want = model_stock(d, 'row').reshape(rows.shape[1:]), want.reshape(rows.shape[1:])
        assert_close(got[c > 0], want[c > 0], rtol=1e-6, atol=1e-9)
        assert_close(got[c <= 0], 0 * got[c <= 0])
        assert_close(want[c <= 0], (3 * c / (1 + 2 * c))[c <= 0, None] * rows.mean(0)[c <= 0], rtol=1e-6, atol=1e-9)
        opposed += int((c <= 0).sum())
    assert opposed


def test_model_stock_has_no_scale_of_its_own():
    "mergekit divides by at least 1e-6, so that cosines of deltas whose norms multiply to less are taken for smaller."
    small = ours(AGREE['model_stock'], 'near')
    assert apart(small * 5000, ours(AGREE['model_stock'])) < 1e-8
    for x, y, d in zip(pieces(small), pieces(GOLDEN['model_stock_near']), pieces(GOLDEN['deltas_near'])):
        assert d.flatten(1).norm(dim=1).max() ** 2 < 1e-6 # the clamp is at work
        assert not x.norm() or y.norm() < .9 * x.norm()


def test_sce_has_no_scale_of_its_own():
    "mergekit gives all experts the same weight where the mean squares of their deltas sum to less than 1e-6."
    def equal(d, b): # the peer's reading: select, erase, plain mean
        var = d.var(0, unbiased=False)
        k = int(.5 * int(var.count_nonzero()))
        d = torch.where(var >= var.flatten().sort(descending=True).values[k - 1], d, 0)
        agree = (d.sign() == d.sum(0).sign()) & (d != 0)
        return (agree * d).sum(0) / agree.sum(0).clamp_min(1)
    small = ours(AGREE['sce'], 'near')
    assert apart(small * 5000, ours(AGREE['sce'])) < 1e-8
    assert apart(ours(equal, 'near'), GOLDEN['sce_near']) < 1e-6
    assert .01 < apart(small, GOLDEN['sce_near']) < 1


def test_signs_that_cancel_elect_nobody():
    "The paper's sgn(0) = 0 leaves the base; mergekit elects plus."
    up = torch.tensor([1., 2., 3., 4.]).double()
    assert_close(GOLDEN['edge_ties_cancel'], up)
    assert_close(ties(torch.stack([up, -up]), density=1.), 0 * up)


def test_sce_of_copies_is_the_expert():
    "Copies vary nowhere; mergekit selects nothing then and returns the base."
    up = torch.tensor([1., 2., 3., 4.]).double()
    assert_close(GOLDEN['edge_sce_copies'], 0 * up)
    assert_close(sce(torch.stack([up, up]), .5), up)


def test_model_stock_does_not_walk_away_from_opposed_experts():
    "At a negative mean cosine mergekit follows the formula to the far side of the base; ours stays there."
    up, side = torch.tensor([1., 2., 3., 4.]).double(), torch.tensor([4., -3., 2., -1.]).double()
    ds = torch.stack([up + side, up - 1.5 * side])
    c = float(torch.cosine_similarity(*ds, dim=0))
    assert c < 0
    assert_close(GOLDEN['edge_stock_opposed'], 2 * c / (1 + c) * ds.mean(0))
    assert_close(model_stock(ds), 0 * up)


# Random methods: the same distribution, not the same draws

N = ABOUT['draws']


@pytest.mark.parametrize('name', ['dare', 'dare_l1', 'dare_ties_l1', 'della', 'della_l1'])
def test_drops_as_often(name):
    "Every entry's share of survivals among mergekit's draws, within five standard deviations of our probability."
    q = ours(lambda d, b: keep_probabilities(d, .5, .6) if 'della' in name else torch.full_like(d, .3), T=1)
    assert ((GOLDEN[f'{name}_survives'] - q).abs() < 5 * (q * (1 - q) / N).sqrt()).all()


OURS = {
    'dare': lambda d, g: dare(d, g, p=.7, rescale='none', lam=1.),
    'dare_l1': lambda d, g: dare(d, g, p=.7, rescale='l1', lam=1.),
    'dare_ties_l1': lambda d, g: dare(d, g, p=.7, rescale='l1', combine='ties', lam=1.),
    'della': lambda d, g: della(d, g, p=.5, epsilon=.6, rescale='none', lam=1.),
    'della_l1': lambda d, g: della(d, g, p=.5, epsilon=.6, rescale='l1', lam=1.),
}


@pytest.mark.parametrize('name', OURS)
def test_has_the_same_mean_and_norm(name):
    "Means of both within five standard errors of each other; rescaled to the L1 norm of the delta where asked."
    g, n, xs = torch.Generator().manual_seed(1), 1000, []
    for d in pieces(GOLDEN['deltas_far']):
        x = torch.stack([OURS[name](d[:1], g) for _ in range(n)]).flatten(1)
        l1 = x.abs().sum(1) / d[0].abs().sum()
        if 'l1' in name: assert_close(l1[l1 > 0], torch.ones_like(l1[l1 > 0]))
        xs.append(x)
    x = torch.cat(xs, 1)
    error = (x.var(0) / n + GOLDEN[f'{name}_var'] / N).sqrt()
    assert ((x.mean(0) - GOLDEN[f'{name}_mean']).abs() < 5 * error).all()
    if 'l1' in name: assert_close(GOLDEN[f'{name}_l1'], torch.ones_like(GOLDEN[f'{name}_l1']))


def test_breadcrumbs_masks_as_many():
    for d in pieces(GOLDEN['deltas_far']):
        assert (breadcrumbs_mask(d, .4, .2).flatten(1).sum(1) == int(.4 * d[0].numel())).all()
