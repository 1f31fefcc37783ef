"""Writes fusion_bench.npz: what fusion-bench makes of three small seeded experts, in float64.

Run in an environment of its own (the versions below are written into the file):
    pip install torch==2.13.0 fusion-bench==0.2.33 'transformers<5' 'datasets<4.5' 'huggingface_hub<1' pyinstrument
    python -P tests/golden/fusion_bench.py   # -P: this file has the package's name, keep its folder off the path
The tests only read the file; they need neither this script nor fusion-bench.
"""
import json
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
import numpy as np
import torch
from torch import nn
from fusion_bench import BaseModelPool
from fusion_bench.method.dop.dop_general import DOPMerging
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.magmax.magmax import magmax_merge
from fusion_bench.method.opcm.opcm_general import OPCM
from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration as svc
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction as tsv
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging

T, NOISE, SEEDS = 3, .3, [0, 1, 2, 3]  # seed 0: base, 1 to T: experts
KNOTS_DENSITY, SVC_ALPHA, TA_LAM, DOP_ALPHA, OPCM_ALPHA, CTS_COMMON = .4, .1, .3, .8, .5, .6


class Tiny(nn.Module):
    "Two linear maps of different shapes with biases, and a LayerNorm between them."
    def __init__(self):
        super().__init__()
        self.up, self.ln, self.down = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)


def model(state): m = Tiny().double(); m.load_state_dict(deepcopy(state)); return m
def draw(seed, like):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in like.items()}
def pool(): return BaseModelPool(models={'_pretrained_': model(base)} | {f't{i}': model(e) for i, e in enumerate(experts)})
def plus(tau, lam=1.): return {k: base[k] + lam * tau[k].detach() for k in base}


base = draw(SEEDS[0], Tiny().state_dict())
experts = [{k: base[k] + NOISE * d for k, d in draw(s, base).items()} for s in SEEDS[1:]]
taus = [{k: e[k] - base[k] for k in base} for e in experts]
out = {'base': base} | {f'expert{i}': e for i, e in enumerate(experts)}

fresh = lambda: deepcopy(taus)
out['iso_c'] = plus(iso_c(fresh(), 'cpu'))
out['iso_cts'] = plus(iso_cts(fresh(), CTS_COMMON, 'cpu'))
out['tsv'] = plus(tsv(fresh(), accelerator='cpu'))
out['wudi'] = plus(wudi_merging(fresh(), accelerator='cpu', iter_num=300))
out['magmax'] = magmax_merge(model(base), [model(e) for e in experts], .5).state_dict()
out['opcm'] = OPCM(alpha=OPCM_ALPHA, shuffle_order=False, save_on_every_step=False).run(pool()).state_dict()

def dop(**kw):
    settings = dict(lr=1e-4, num_steps=200, mgda=False, ema=True, ema_beta=.999, alpha=DOP_ALPHA, svd_epsilon=.99999,
                    svd_proj_space='uv', shuffle_order=False, save_on_every_step=False, evaluate_on_every_step=False)
    torch.manual_seed(0)
    return DOPMerging(**settings | kw).run(pool()).state_dict()
out['dop_published'] = dop(mgda=True)                     # 200 Adam steps with MGDA weights
out['dop_fixed'] = dop()                                  # the same with a fixed weight
adam, torch.optim.Adam = torch.optim.Adam, lambda params, lr: torch.optim.SGD(params, lr, momentum=.98, nesterov=True)
out['dop_converged'] = dop(lr=.03, num_steps=8_000)       # the same to the minimum: Adam of constant step stalls before it
torch.optim.Adam = adam

linear = [k for k, v in base.items() if v.ndim == 2]
out['knots_parts'] = {f'{k}.{i}': S[:, None] * V for k in linear
                      for _, S, Vs in [subspace_alignment([t[k] for t in taus])] for i, V in enumerate(Vs)}
def knots(k): # alignment, then TIES on the parts of one matrix, then back
    U, S, Vs = subspace_alignment([t[k] for t in taus])
    parts = torch.stack([(S[:, None] * V).flatten() for V in Vs])
    return base[k] + U @ ties_merging(parts, KNOTS_DENSITY, 'mean').reshape(len(S), -1)
out['knots_ties'] = {k: knots(k) for k in linear}
ta = lambda k: base[k] + TA_LAM * sum(t[k] for t in taus)
out['svc'] = {k: svc(base[k], [e[k] for e in experts], ta(k), SVC_ALPHA) for k in linear}

PACKAGES = 'fusion-bench', 'torch', 'numpy', 'transformers', 'lightning'
about = dict(versions={p: version(p) for p in PACKAGES}, seeds=SEEDS, noise=NOISE, knots_density=KNOTS_DENSITY,
             svc_alpha=SVC_ALPHA, ta_lam=TA_LAM, dop_alpha=DOP_ALPHA, opcm_alpha=OPCM_ALPHA, cts_common=CTS_COMMON)
about['shapes'] = {m: {k: list(v.shape) for k, v in state.items()} for m, state in out.items()}
vector = lambda state: torch.cat([v.detach().double().flatten() for v in state.values()]).numpy()  # a whole model
flat = {m: vector(state) for m, state in out.items()}
np.savez_compressed(Path(__file__).with_suffix('.npz'), about=json.dumps(about), **flat)
print(about, Path(__file__).with_suffix('.npz').stat().st_size, 'bytes')
