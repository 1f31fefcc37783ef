"""What every entry of METHODS promises, tried on each: a method that enters the table is tested here without a word.

The few dictionaries below say what no field of an entry says. A name that is absent takes its family's promise."""
import itertools
import re
from math import inf, isfinite, nan, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from direction_fusion.core import fingerprint
from direction_fusion.fusion import Fusion, fold, fuse, load_fusion, takes_rule
from direction_fusion.methods import METHODS, SLOTS, Method, _arguments, accepted, check_params, hyperparameters, load_plugins

FUSING = {n: m for n, m in METHODS.items() if m.kind != 'training'}
FAMILIES = 'soup', 'orthogonal', 'dora', 'sparse', 'spectral', 'calibrated', 'baseline'
BUDGET = 9 # settings tried on validation data: the same for every method
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS = 'random', 'low rank', 'zero', 'duplicate', 'opposite', 'orthogonal'
ROLES = {'up.weight': 'linear', 'up.bias': 'bias', 'c_fc.weight': 'linear_t', 'wte.weight': 'embedding', 'conv.weight': 'conv',
         'ln.weight': 'norm', 'scale': 'other', 'n': 'buffer'}
every = pytest.mark.parametrize('name', FUSING)


# Models, experts, statistics

def shapes(d_out, d_in): # one parameter of every role; c_fc is stored (d_in, d_out)
    return {'up.weight': (d_out, d_in), 'up.bias': (d_out,), 'c_fc.weight': (d_in, d_out), 'wte.weight': (5, d_in),
            'conv.weight': (2, 2, 2, 2), 'ln.weight': (d_in,), 'scale': ()}


def deltas(kind, T, shape, g): # (T, *shape)
    ds = .25 * torch.randn(T, *shape, generator=g, dtype=torch.float64)
    if kind == 'low rank' and len(shape) == 2: ds = ds[:, :, :1] * ds[:, :1]
    if kind == 'zero': ds = 0 * ds
    if kind == 'duplicate': ds = ds[:1].expand_as(ds).clone()
    if kind == 'opposite': ds = torch.stack([ds[0] * (-1) ** t for t in range(T)])
    if kind == 'orthogonal':
        n = ds[0].numel()
        ds = torch.stack([(torch.arange(n) == t % n).double().reshape(shape) for t in range(T)])
    return (ds * 256).round() / 256 # a grid, so that sums of few are exact in every dtype but the halves


def models(T=3, kind='random', d_out=6, d_in=4, dtype=torch.float32, seed=0, only=None): # base, experts
    g = torch.Generator().manual_seed(seed)
    base = {k: (torch.randn(s, generator=g, dtype=torch.float64) * 256).round() / 256 for k, s in shapes(d_out, d_in).items()}
    moves = {k: deltas(kind, T, b.shape, g) for k, b in base.items()}
    experts = [{k: (b + moves[k][t]).to(dtype) for k, b in base.items()} for t in range(T)]
    base = {k: b.to(dtype) for k, b in base.items()}
    for sd, n in zip([base, *experts], itertools.count(7)): sd['n'] = torch.tensor(n)
    return (base, experts) if only is None else ({k: base[k] for k in only}, [{k: e[k] for k in only} for e in experts])


def statistics(name, base, T, seed=0): # what the entry needs, one mapping per expert; None if it needs nothing
    need, g = FUSING[name].needs.removeprefix('merged_'), torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)
    d_in = {k: b.shape[ROLES[k] == 'linear'] for k, b in base.items() if ROLES[k] in ('linear', 'linear_t')}
    square = lambda x: x.mT @ x / len(x)
    one = {'covariance': lambda: {k: square(draw(20, d)) for k, d in d_in.items()},
           'fisher': lambda: {k: draw(*b.shape).square() for k, b in base.items() if b.is_floating_point()}}.get(need)
    kind = lambda k: torch.promote_types(base[k].dtype, torch.float32)
    return one and [{need: {k: v.to(kind(k)) for k, v in one().items()}} for _ in range(T)]


def score(tau): # likes a length of 1, in any basis
    return -abs(tau.norm() - 1)


def settled(name, params=()): # a shorter way where an optimiser walks
    return ({'steps': 5} if 'steps' in hyperparameters(FUSING[name]) else {}) | dict(params)


def start(name, base, **params): return Fusion(base, name, {k: ROLES[k] for k in base}, score=score, **settled(name, params))


def run(name, base, experts, stats=None, **params): # merged state dict
    fusion = start(name, base, **params)
    for e, s in zip(experts, stats or statistics(name, base, len(experts)) or itertools.repeat(None)): fusion.add(e, stats=s)
    return fusion.merged()


def own(name, base): # taken by the rule, not by its fallback
    return [k for k in base if k != 'n' and takes_rule(FUSING[name], ROLES[k], base[k].ndim)]


def most(name): return min(6, FUSING[name].most or 6) # experts at once


def moved(a, b): return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def same_bits(a, b): assert_close(a, b, rtol=0, atol=0)


# What an entry says

def test_only_training_is_left_out():
    left = {n: m for n, m in METHODS.items() if n not in FUSING}
    assert all(m.needs == 'training' and not (m.add or m.rule or m.whole) for m in left.values())
    assert len(FUSING) >= 8


@pytest.mark.parametrize('name', METHODS)
def test_entry_is_complete(name):
    m = METHODS[name]
    assert re.fullmatch(r'[a-z][a-z0-9_]*', name) and m.title.strip() and m.cost.strip() and m.family in FAMILIES
    assert m.kind == 'training' or re.search(r'\d', m.cite) or 'this project' in m.cite, f'cite: {m.cite!r}'
    assert m.needs in ('', 'covariance', 'merged_covariance', 'fisher', 'validation', 'training')
    assert [n for n, o in METHODS.items() if o.title == m.title] == [name], 'another entry has this title'


@every
def test_fields_fit_the_functions(name):
    m, args = FUSING[name], _arguments(FUSING[name].add, FUSING[name].merged, FUSING[name].rule, FUSING[name].whole)
    assert sum(f is not None for f in (m.add, m.rule, m.whole)) == 1
    assert bool(m.add) == bool(m.merged) and (m.add or not m.remove) and (m.rule or not m.survey)
    assert m.random == ('generator' in args), '`random` says whether the rule draws'
    assert ('survey' in args) == bool(m.survey)
    need = m.needs.removeprefix('merged_') # measured elsewhere, but a covariance
    assert need not in ('covariance', 'fisher') or {need, need + 's'} & args.keys()
    assert (m.needs == 'validation') == ('score' in args)
    for f in (m.add, m.merged, m.remove, m.rule, m.whole, m.survey, *m.fallback):
        for n, p in _arguments(f).items(): assert n in (*SLOTS, 'params') or p.default is not p.empty, f'{n} has no default'


@every
def test_hyperparameters_lie_in_their_ranges(name):
    m, known = FUSING[name], hyperparameters(FUSING[name])
    assert m.ranges.keys() | m.grid.keys() | m.published.keys() <= known.keys()
    assert {n for n, d in known.items() if not isinstance(d, bool)} <= m.ranges.keys(), 'a hyper-parameter without a range'
    check_params(m, known, name)
    check_params(m, m.published, name)
    assert all(len({*v}) == len(v) > 1 for v in m.grid.values()) and prod(map(len, m.grid.values())) <= BUDGET
    for n, values in m.grid.items():
        for v in values: check_params(m, {n: v}, name)
    for n, r in m.ranges.items():
        if isinstance(r[0], str): assert all(isinstance(c, str) for c in r) and len({*r}) == len(r)
        else: assert len(r) == 2 and r[0] < r[1]


@every
def test_out_of_range_is_refused(name):
    base, m = models(1)[0], FUSING[name]
    with pytest.raises(ValueError, match='no parameter'): start(name, base, no_such_parameter=1)
    for n, r in m.ranges.items():
        bad = ['no such choice', 1] if isinstance(r[0], str) else ['a', None, True, nan, *(v for v in (r[0] - 1, r[1] + 1) if isfinite(v))]
        for v in bad:
            with pytest.raises(ValueError, match=f'`{n}`'): start(name, base, **{n: v})


@every
def test_every_value_in_range_works(name):
    base, experts = models(2)
    for n, r in FUSING[name].ranges.items():
        for v in r:
            if v in (inf, -inf) or n == 'steps': continue
            v = type(hyperparameters(FUSING[name])[n])(v) # an integer stays one
            try: out = run(name, base, experts, **{n: v})
            except ValueError as e: # a condition on two of them together
                assert f'`{n}`' in str(e) and any(f'`{o}`' in str(e) for o in hyperparameters(FUSING[name]) if o != n), f'{n}={v!r}: {e}'
            else: assert all(torch.isfinite(x).all() for x in out.values()), f'{n}={v!r}'


# What comes out

@every
@pytest.mark.parametrize('dtype', DTYPES, ids=lambda d: str(d).removeprefix('torch.'))
def test_names_shapes_dtypes(name, dtype):
    base, experts = models(2, dtype=dtype)
    stats = statistics(name, base, 2)
    measured = [x for s in stats or [] for x in s.values()]
    before = [fingerprint(x) for x in (base, *experts, *measured)]
    out = run(name, base, experts, stats)
    assert [fingerprint(x) for x in (base, *experts, *measured)] == before, 'an input was changed'
    assert list(out) == list(base)
    for k, b in base.items(): assert (out[k].shape, out[k].dtype) == (b.shape, b.dtype), k
    same_bits(out['n'], base['n'])
    assert all(torch.isfinite(x).all() for x in out.values())
    assert moved(out, base) > 0
    for x in out.values(): x.zero_() # the result shares no memory with its inputs
    assert [fingerprint(x) for x in (base, *experts, *measured)] == before


@every
def test_seed(name):
    base, experts = models(2, d_out=8, d_in=8)
    a, b, c = (run(name, base, experts, seed=s) for s in (0, 0, 1))
    same_bits(a, b)
    if FUSING[name].random: assert moved(a, c) > 0
    else: same_bits(a, c)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    same_bits(run(name, base, experts, seed=0), a)
    assert torch.equal(torch.get_rng_state(), state), 'the global generator was used'


@every
def test_order_of_names_does_not_matter(name):
    base, experts = models(2)
    stats, back = statistics(name, base, 2), lambda d: dict(reversed(d.items()))
    same_bits(run(name, base, [back(e) for e in experts], stats), run(name, base, experts, stats))
    same_bits(dict(sorted(run(name, back(base), experts, stats).items())), dict(sorted(run(name, base, experts, stats).items())))


@every
def test_fold_ends_in_fuse(name):
    T = min(4, most(name))
    base, experts = models(T)
    stats = statistics(name, base, T)
    steps = list(fold(base, experts, name, stats=stats, roles=ROLES, score=score, **settled(name)))
    for t in range(T): same_bits(steps[t], run(name, base, experts[:t + 1], stats and stats[:t + 1]))
    same_bits(fuse(base, experts, name, stats=stats, roles=ROLES, score=score, **settled(name)), steps[-1])


@every
def test_transposed_maps(name):
    base, experts = models(2, only=['up.weight'])
    stats = statistics(name, base, 2)
    turn = lambda sd: {'c_fc.weight': sd['up.weight'].mT.contiguous()}
    stats_t = stats and [{s: turn(v) for s, v in one.items()} for one in stats]
    if FUSING[name].random: return # one stream per name
    got = run(name, turn(base), [turn(e) for e in experts], stats_t)
    assert_close(got, turn(run(name, base, experts, stats)), rtol=1e-5, atol=1e-6)


# Order

def sequences(T): # inputs on which the order may show: (kind, seed)
    return [models(T, kind, dtype=torch.float64, seed=s) for kind, s in
            [('random', 0), ('random', 1), ('low rank', 2), ('opposite', 3), ('orthogonal', 4)]]


def spread(name, base, experts, **params): # largest difference between two orders
    stats = statistics(name, base, len(experts)) or [None] * len(experts)
    pairs = list(zip(experts, stats))
    orders = [pairs, pairs[::-1], pairs[1:] + pairs[:1]]
    first, *others = (run(name, base, [e for e, _ in o], [s for _, s in o] if o[0][1] else None, **params) for o in orders)
    return max(moved(first, x) for x in others)


@every
def test_order_free_says_the_truth(name):
    m, T = FUSING[name], min(4, most(name))
    grid = [{}, *({n: v} for n, vs in m.grid.items() for v in vs)]
    if m.order_free:
        for base, experts in sequences(T)[:3]: assert spread(name, base, experts) < 1e-9
    else: assert any(spread(name, *x, **p) > 1e-6 for p in grid for x in sequences(T)), 'no input shows that the order matters'


# Changes of basis: which side of a linear map may be turned, f(QΔP) = Q f(Δ) P

SIDES = dict(soup='both', baseline='both', orthogonal='both', dora='both', spectral='both', sparse='', calibrated='')
SIDES_OF = dict(
    dora_polar='right', dora_polar_joint='right',                             # lengths and angles of rows
    knots='left', do_merging='left', widen='left',  # signs and magnitudes in the inputs' basis; lengths and angles of columns
    regmean='left', regmean_pp='left',              # the off-diagonal factor belongs to the inputs' basis
    wudi='')                                        # Adam scales each entry on its own


@every
def test_changes_of_basis(name):
    side = SIDES_OF.get(name, SIDES.get(FUSING[name].family, ''))
    for (n, m), seed in itertools.product([(5, 3), (3, 5)], range(2)):
        T = min(3, most(name))
        base, experts = models(T, d_out=n, d_in=m, dtype=torch.float64, seed=seed, only=['up.weight'])
        g, stats = torch.Generator().manual_seed(seed), statistics(name, base, T)
        Q, P = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for d in (n, m))
        Q, P = Q if side in ('both', 'left') else torch.eye(n).double(), P if side in ('both', 'right') else torch.eye(m).double()
        turn = lambda sd: {k: Q @ v @ P for k, v in sd.items()}
        seen = stats if name != 'dora_inputs' else [{'covariance': {k: P.mT @ C.double() @ P for k, C in s['covariance'].items()}} for s in stats]
        got = run(name, turn(base), [turn(e) for e in experts], seen) # inputs are turned with the experts, where the rule sees them as such
        assert_close(got, turn(run(name, base, experts, stats)), rtol=1e-6, atol=1e-8)


# One expert, copies of one, none that moved

ALONE = dict(dora=dict(rho=0.), dora_sides=dict(rho=0.), dora_inputs=dict(rho=0.), dora_polar={}, dora_polar_joint={}, regmean={}, regmean_pp={}, fisher={}, do_merging={}, widen={}, opcm={}) # T = 1
COPIES = ALONE | dict(widen=None, opcm=None)                                                          # T copies
SUMS = 'orthogonal_deltas', 'orthogonal_subspace', 'orthogonal_model', 'orthogonal_symmetric', 'tsv_m', 'magmax', 'task_arithmetic'


@every
def test_one_expert(name):
    params = ALONE.get(name, {} if FUSING[name].family == 'soup' else dict(lam=1.) if name in SUMS else None)
    if params is None: return # the entry does not promise it
    for kind in ('random', 'low rank'):
        base, experts = models(1, kind, dtype=torch.float64)
        assert_close(run(name, base, experts, **params), experts[0] | {'n': base['n']}, rtol=1e-7, atol=1e-9)


@every
def test_copies_of_one_expert(name):
    params = COPIES.get(name, {} if FUSING[name].family == 'soup' else None)
    if params is None: return # the entry does not promise it
    for kind, T in itertools.product(('random', 'low rank'), {2, most(name)}):
        base, experts = models(1, kind, dtype=torch.float64)
        assert_close(run(name, base, experts * T, **params), experts[0] | {'n': base['n']}, rtol=1e-7, atol=1e-9)


@every
@pytest.mark.parametrize('dtype', DTYPES, ids=lambda d: str(d).removeprefix('torch.'))
def test_experts_that_did_not_move_give_the_base(name, dtype):
    base = models(1, dtype=dtype)[0]
    rounding = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=0, atol=0) # rules that leave the base and come back
    for T in {1, most(name)}: assert_close(run(name, base, [base] * T), base, **rounding)


NOT_A_SCALE = ('dora', 'dora_sides', 'dora_inputs', # its λ scales what the ridge pulls to
               'orthomerge')          # and this one what is left beside the rotation


@every
def test_scale_of_zero_gives_the_base(name):
    if 'lam' not in hyperparameters(FUSING[name]) or name in NOT_A_SCALE: return
    base, experts = models(2)
    out = run(name, base, experts, lam=0.)
    for k in own(name, base): same_bits(out[k], base[k])


@every
def test_weights_of_zero_give_the_base_or_an_error(name):
    m = FUSING[name]
    base, experts = models(2)
    stats, weigh = statistics(name, base, 2), {'weight', 'weights'} & _arguments(m.add, m.rule, m.whole).keys()
    attempt = lambda ws: fuse(base, experts, name, roles=ROLES, stats=stats, score=score, weights=ws, **settled(name))
    if not weigh:
        with pytest.raises(ValueError, match='does not weigh experts'): attempt([2., 1.])
        return
    assert moved(attempt([1., 3.]), attempt([3., 1.])) > 0, 'weights have no effect'
    try: out = attempt([0., 0.])
    except ValueError as e: assert 'weight' in str(e)
    else: assert all(torch.equal(out[k], base[k]) for k in own(name, base))


# State

def sequential(): return [n for n, m in FUSING.items() if m.kind == 'sequential']


@pytest.mark.parametrize('name', sequential())
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_saved_state_is_the_state(name, dtype, tmp_path):
    base, experts = models(4, dtype=dtype)
    stats = statistics(name, base, 4) or [None] * 4
    whole = start(name, base)
    for e, s in zip(experts, stats): whole.add(e, stats=s)
    for cut in (1, 3):
        part = start(name, base)
        for e, s in zip(experts[:cut], stats): part.add(e, stats=s)
        part.save(tmp_path/'state.safetensors')
        part = load_fusion(tmp_path/'state.safetensors', base)
        for e, s in zip(experts[cut:], stats[cut:]): part.add(e, stats=s)
        same_bits(dict(part.merged_tau()), dict(whole.merged_tau()))
        same_bits(part.merged(), whole.merged())


@pytest.mark.parametrize('name', sequential())
def test_state_is_of_constant_size_and_never_changed(name):
    base, experts = models(5)
    fusion, sizes = start(name, base), []
    for e, s in zip(experts, statistics(name, base, 5) or [None] * 5):
        old = fusion.states
        copy = {k: {n: torch.as_tensor(v).clone() for n, v in state.items()} for k, state in old.items()}
        fusion.add(e, stats=s)
        for k, state in copy.items():
            for n, v in state.items(): same_bits(torch.as_tensor(old[k][n]), v)
        sizes.append({(k, n): tuple(torch.as_tensor(v).shape) for k, state in fusion.states.items() for n, v in state.items()})
    assert all(s == sizes[1] for s in sizes[1:]), 'the state grows'


@pytest.mark.parametrize('name', [n for n, m in FUSING.items() if m.remove])
def test_remove_undoes_add(name):
    base, experts = models(4, dtype=torch.float64)
    stats, weigh = statistics(name, base, 4) or [None] * 4, 'weight' in _arguments(FUSING[name].add)
    for i in range(4):
        fusion, rest = start(name, base), start(name, base)
        for t, (e, s) in enumerate(zip(experts, stats)):
            fusion.add(e, f'expert {t}', t + 1. if weigh else 1., s)
            if t != i: rest.add(e, None, t + 1. if weigh else 1., s)
        assert_close(fusion.remove(experts[i], f'expert {i}', stats=stats[i]).merged(), rest.merged(), rtol=1e-9, atol=1e-10)
    for t in (0, 1, 2): fusion.remove(experts[t], f'expert {t}', stats=stats[t])
    same_bits(fusion.merged(), base)


@pytest.mark.parametrize('name', [n for n, m in FUSING.items() if m.kind in ('joint', 'whole')])
def test_joint_methods_say_so(name, tmp_path):
    with pytest.raises(ValueError, match=f'is {FUSING[name].kind}: it has no state'): start(name, models(1)[0]).save(tmp_path/'x.safetensors')


# Any shape, any number of experts, any lie of the deltas

@every
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(d_out=st.integers(1, 7), d_in=st.integers(1, 7), T=st.integers(1, 6), kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_finite(name, d_out, d_in, T, kind, seed, dtype):
    base, experts = models(min(T, most(name)), kind, d_out, d_in, dtype, seed)
    out = run(name, base, experts)
    for k, b in base.items():
        assert out[k].shape == b.shape and torch.isfinite(out[k]).all(), k


@every
@pytest.mark.parametrize('kind', KINDS)
def test_finite_at_the_corners(name, kind):
    for (d_out, d_in), T in itertools.product([(1, 1), (1, 5), (5, 1)], {1, most(name)}):
        out = run(name, *models(T, kind, d_out, d_in))
        assert all(torch.isfinite(x).all() for x in out.values()), (d_out, d_in, T)


@every
def test_bad_numbers_are_named(name):
    base, experts = models(2)
    for bad, k in itertools.product([nan, inf, -inf], ['up.weight', 'up.bias', 'scale']):
        broken = experts[1] | {k: experts[1][k].clone()}
        broken[k].view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f"expert 2, '{k}'"): run(name, base, [experts[0], broken])


@pytest.mark.parametrize('name', [n for n, m in FUSING.items() if m.most])
def test_too_many_experts_are_refused(name):
    base, experts = models(FUSING[name].most + 1)
    with pytest.raises(ValueError, match=f'at most {FUSING[name].most} experts'): run(name, base, experts)


@every
def test_bad_experts_are_named(name):
    base, (a, b) = models(2)
    with pytest.raises(ValueError, match="expert 2 lacks 'up.bias'"): run(name, base, [a, {k: v for k, v in b.items() if k != 'up.bias'}])
    with pytest.raises(ValueError, match=r"expert 2, 'up.bias': expected shape \(6,\), got \(5,\)"):
        run(name, base, [a, b | {'up.bias': b['up.bias'][1:]}])
    with pytest.raises(ValueError, match='at least one state dict'): fuse(base, [], name, roles=ROLES, score=score)


@pytest.mark.parametrize('name', [n for n, m in FUSING.items() if m.needs in ('covariance', 'fisher')])
def test_missing_statistics_are_named(name):
    base, experts = models(2)
    with pytest.raises(ValueError, match=f"needs stats={{'{FUSING[name].needs}': …}}"): start(name, base).add(experts[0])


def test_regmean_pp_is_regmean_with_other_statistics():
    base, experts = models(2)
    stats = statistics('regmean_pp', base, 2)
    same_bits(run('regmean_pp', base, experts, stats), run('regmean', base, experts, stats))
    with pytest.raises(ValueError, match='`covariances` of shape .* are needed'): fuse(base, experts, 'regmean_pp', roles=ROLES)


# That these tests can fail

LIES = dict(
    first=(lambda deltas: deltas[0], {}, test_order_free_says_the_truth),
    unused=(lambda deltas: deltas.mean(0), dict(order_free=False), test_order_free_says_the_truth),
    loud=(lambda deltas, lam=2.: lam * deltas.mean(0), dict(ranges=dict(lam=(0, 1))), test_hyperparameters_lie_in_their_ranges),
    open_end=(lambda deltas, p=1.: deltas.mean(0) / p, dict(ranges=dict(p=(0, 1))), test_every_value_in_range_works),
    signs=(lambda deltas: deltas.sign().mean(0), dict(family='spectral'), test_changes_of_basis),
    total=(lambda deltas: deltas.sum(0), dict(family='soup'), test_copies_of_one_expert),
    shifted=(lambda deltas, lam=1.: lam * deltas.mean(0) + 1, dict(ranges=dict(lam=(0, 1))), test_scale_of_zero_gives_the_base),
    moving=(lambda deltas: deltas.mean(0) + 1, {}, lambda n: test_experts_that_did_not_move_give_the_base(n, torch.float32)),
    dice=(lambda deltas: deltas.mean(0) * torch.rand(()), {}, test_seed),
    halved=(lambda deltas: deltas.mean(0) / deltas.mean(0).norm(), {}, lambda n: test_finite_at_the_corners(n, 'zero')),
    idle=(lambda deltas, weights: deltas.mean(0), {}, test_weights_of_zero_give_the_base_or_an_error),
    in_place=(lambda deltas, base: base.zero_(), {}, lambda n: test_names_shapes_dtypes(n, torch.float32)))


@pytest.mark.parametrize('lie', LIES)
def test_a_lie_is_caught(lie, monkeypatch):
    rule, fields, test = LIES[lie]
    m = Method(**dict(title='A lie', family='user', cite='1') | fields, rule=rule)
    for table in (METHODS, FUSING): monkeypatch.setitem(table, lie, m)
    with pytest.raises((AssertionError, ValueError)): test(lie)


@pytest.mark.parametrize('name', METHODS)
def test_every_method_has_a_look_of_its_own(name):
    from direction_fusion.plots import FAMILIES, method_style
    assert name in ' '.join(names for _, names in FAMILIES.values()).split()
    assert not any(method_style(name) == method_style(other) for other in METHODS if other != name)


# Hyper-parameters

TRIED = dict(density=.5, p=.4, epsilon=.3, gamma=.2, lam=.7, alpha=.2, beta=.4, rho=.8, ceiling=.3, t=.2, s=.5, svc_alpha=2., floor=.9,
             common=.3, rank=1, steps=2, lr=.1)                  # far enough from every default to tell


@every
def test_every_hyperparameter_does_something(name):
    m, known = FUSING[name], hyperparameters(FUSING[name])
    weigh = accepted(m, 'weight')                                # some are heard only where experts weigh differently
    def run(name, base, experts, **params):
        fusion, stats = start(name, base, **params), statistics(name, base, len(experts)) or [None] * len(experts)
        for t, (e, s) in enumerate(zip(experts, stats)): fusion.add(e, stats=s, weight=t + 1. if weigh and 'drawn' not in params else 1.)
        return fusion.merged()
    for n, default in known.items():
        also = dict(scope='tensor') if name == 'ties' and n == 'rescale' else {}  # one that needs another
        others = [not default] if isinstance(default, bool) else [c for c in m.ranges[n] if c != default] if isinstance(default, str) else \
            [int(TRIED.get(n, .6)) if isinstance(default, int) else TRIED.get(n, .6)]
        for value in others:
            heard = (moved(*(run(name, base, experts, **settled(name) | also | {n: v}) for v in (default, value)))
                     for kind, seed in [('random', 0), ('low rank', 1), ('opposite', 2)]
                     for base, experts in [models(2 if n == 'drawn' else min(3, most(name)), kind, dtype=torch.float64, seed=seed)])
            assert any(x > 1e-9 for x in heard), f'{n}={value!r} gives what {n}={default!r} gives'


def test_a_package_brings_a_method(tmp_path, monkeypatch):
    (tmp_path/'median_fusion.py').write_text('def median(deltas, lam=1.): return lam * deltas.median(0).values\n')
    info = tmp_path/'median_fusion-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: median-fusion\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[direction_fusion.methods]\nmedian = median_fusion:median\n')
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins()
    load_plugins()                                               # twice does no harm
    try:
        base, experts = models(3)
        got = fuse(base, experts, 'median', roles=ROLES, lam=.5)
        middle = torch.stack([e['up.weight'] - base['up.weight'] for e in experts]).median(0).values
        assert_close(got['up.weight'], base['up.weight'] + .5 * middle)
    finally: METHODS.pop('median')
