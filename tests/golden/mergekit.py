"""Write mergekit.npz: what mergekit computes on small seeded tensors, for tests/test_golden_mergekit.py.

Needs an environment of its own:  pip install torch==2.13.0 mergekit==0.1.5
Run from the repository root:     python -P tests/golden/mergekit.py
(-P: otherwise this file, of the same name, is what `import mergekit` finds)

mergekit is called through its in-memory interface, `mergekit.merge_methods.api.merge_tensors`, in float64.
Each array holds the merged *deltas* of all shapes, flattened and joined in the order of SHAPES.
"""
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from mergekit.merge_methods.api import merge_tensors

SEED, DRAWS = 0, 4000
SHAPES = [(5,), (6, 3), (3, 6)]          # 1-D, tall, wide
SCALES = {'far': .5, 'near': 1e-4}       # standard deviation of the deltas; the base's is 1

# golden name → mergekit's method, its parameters, number of experts, whether it gets the base, which inputs
CASES = {
    'linear': ('linear', dict(weight=[1., 2., 3.]), 3, False, 'far'),
    'task_arithmetic': ('task_arithmetic', {'weight': 1., 'lambda': .3}, 3, True, 'far'),
    'slerp': ('slerp', dict(t=.3), 2, 'first', 'far'),
    'slerp_near': ('slerp', dict(t=.3), 2, 'first', 'near'),
    'nuslerp': ('nuslerp', dict(weight=[1., 3.]), 2, True, 'far'),
    'nuslerp_rows': ('nuslerp', dict(weight=[1., 3.], nuslerp_flatten=False), 2, True, 'far'),
    'nuslerp_weights': ('nuslerp', dict(weight=[1., 3.]), 2, False, 'far'),
    'multislerp': ('multislerp', dict(weight=[1., 2., 3.]), 3, True, 'far'),
    'multislerp_weights': ('multislerp', dict(weight=[1., 2., 3.]), 3, False, 'far'),
    'karcher': ('karcher', dict(max_iter=1000, tol=1e-12), 3, False, 'far'),
    'karcher_default': ('karcher', {}, 3, False, 'far'),
    'model_stock': ('model_stock', {}, 3, True, 'far'),
    'model_stock_rows': ('model_stock', dict(filter_wise=True), 3, True, 'far'),
    'model_stock_near': ('model_stock', {}, 3, True, 'near'),
    'ties': ('ties', dict(weight=1., density=.4), 3, True, 'far'),
    'ties_weights': ('ties', {'weight': [1., 2., 3.], 'density': .4, 'lambda': .7}, 3, True, 'far'),
    'breadcrumbs': ('breadcrumbs', {'weight': [1., 2., 3.], 'density': .4, 'gamma': .2, 'lambda': .3}, 3, True, 'far'),
    'breadcrumbs_full': ('breadcrumbs', dict(weight=1., density=.9, gamma=.2), 3, True, 'far'),
    'breadcrumbs_ties': ('breadcrumbs_ties', dict(weight=1., density=.4, gamma=.2, normalize=True), 3, True, 'far'),
    'sce': ('sce', dict(select_topk=.5), 3, True, 'far'),
    'sce_all': ('sce', dict(select_topk=1.), 3, True, 'far'),
    'sce_near': ('sce', dict(select_topk=.5), 3, True, 'near'),
}
# random ones: mergekit's method and parameters, for the first expert alone
RANDOM = {
    'dare': ('dare_linear', dict(weight=1., density=.3, rescale=False)),
    'dare_l1': ('dare_linear', dict(weight=1., density=.3)),
    'dare_ties_l1': ('dare_ties', dict(weight=1., density=.3)),
    'della': ('della', dict(weight=1., density=.5, epsilon=.3, rescale=False)),
    'della_l1': ('della', dict(weight=1., density=.5, epsilon=.3)),
}


def merged_delta(base, experts, method, params, with_base):
    "Merged tensor less the base."
    tensors, base_index = list(experts), None
    if with_base is True: tensors, base_index = [base, *experts], 0
    if with_base == 'first': base_index = 0     # slerp calls one of the two models its base
    return merge_tensors(tensors, method, parameters=params, base_index=base_index) - base


def inputs():
    "Base and three experts' deltas of every shape, flattened and joined."
    g = torch.Generator().manual_seed(SEED)
    draw = lambda: torch.cat([torch.randn(s, generator=g, dtype=torch.float64).flatten() for s in SHAPES])
    base, common = draw(), draw()
    directions = torch.stack([draw() + common for _ in range(3)])
    return base, {k: s * directions for k, s in SCALES.items()}


def pieces(x):
    "Flat vectors (…, 41) as tensors of every shape."
    return [p.reshape(*x.shape[:-1], *s) for p, s in zip(x.split([int(np.prod(s)) for s in SHAPES], -1), SHAPES)]


def main():
    base, deltas = inputs()
    out = dict(base=base, **{f'deltas_{k}': d for k, d in deltas.items()})
    for name, (method, params, T, with_base, which) in CASES.items():
        out[name] = torch.cat([merged_delta(b, b + d[:T], method, params, with_base).flatten()
                               for b, d in zip(pieces(base), pieces(deltas[which]))])
    torch.manual_seed(SEED)
    for name, (method, params) in RANDOM.items():
        for b, d, shape in zip(pieces(base), pieces(deltas['far']), SHAPES):
            x = torch.stack([merged_delta(0 * b, d[:1], method, params, True) for _ in range(DRAWS)])
            l1 = x.abs().flatten(1).sum(1) / d[0].abs().sum()
            for stat, v in dict(survives=(x != 0).double().mean(0), mean=x.mean(0), var=x.var(0), l1=l1[l1 > 0].aminmax()).items():
                v = torch.stack(list(v)) if stat == 'l1' else v.flatten()
                out[f'{name}_{stat}'] = torch.cat([out[f'{name}_{stat}'], v]) if f'{name}_{stat}' in out else v
    # edges, on which readings differ: base zero, so that the sums are exact
    zero, up, side = torch.zeros(4), torch.tensor([1., 2., 3., 4.]), torch.tensor([4., -3., 2., -1.])
    edge = lambda ds, method, **params: merged_delta(zero.double(), torch.stack(ds).double(), method, params, True)
    out |= dict(edge_ties_cancel=edge([up, -up], 'ties', weight=1.), edge_sce_copies=edge([up, up], 'sce', select_topk=.5),
                edge_stock_opposed=edge([up + side, up - 1.5 * side], 'model_stock'))
    about = dict(mergekit=version('mergekit'), torch=torch.__version__, numpy=np.__version__, python=platform.python_version(),
                 seed=SEED, draws=DRAWS, shapes=SHAPES, cases={k: [v[0], v[1]] for k, v in (CASES | RANDOM).items()})
    np.savez_compressed(Path(__file__).with_suffix('.npz'), about=json.dumps(about), **{k: v.numpy() for k, v in out.items()})


if __name__ == '__main__': main()
