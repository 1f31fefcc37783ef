"The measurements of notebook 17 on a real, tiny study: shapes, ranges, and that training moves what it should."
import shutil
from pathlib import Path

import pytest
import torch

from direction_fusion.alignment import VARIANTS, prediction_rows, proxy_rows, training_rows, variant
from direction_fusion.study import bench, load_study

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('alignment')
    shutil.copy(ROOT/'settings.ini', root)
    return load_study('quick', root, tasks=('digits:0-1', 'digits:2-3'), epochs=2, stat_examples=16)


def test_variant_learns_and_moves_what_it_trains(tiny):
    tau, right = variant(tiny, 'digits:0-1', lr=2e-3, epochs=4, examples=64)
    assert right > .9 and tau.norm() > 0
    low, _ = variant(tiny, 'digits:0-1', lr=2e-3, epochs=1, rank=2, examples=64)
    for k, v in low.items():
        if bench(tiny).roles.get(k) == 'linear': assert torch.linalg.matrix_rank(v.double(), rtol=1e-5) <= 2, k
        else: assert v.abs().max() == 0, k
    again, _ = variant(tiny, 'digits:0-1', lr=2e-3, epochs=1, rank=2, examples=64)
    assert all(torch.equal(again[k], v) for k, v in low.items())
    with pytest.raises(ValueError, match="`optimizer` must be adamw or sgd, got 'adam'"):
        variant(tiny, 'digits:0-1', optimizer='adam')


def test_rows_hold_shares_and_one_line_each(tiny, monkeypatch):
    rows = proxy_rows(tiny, only='')
    assert {r['task'] for r in rows} == set(tiny.tasks) and len({r['layer'] for r in rows}) * 2 == len(rows)
    assert all(r['captured'] <= 1 + 1e-6 for r in rows)
    monkeypatch.setattr('direction_fusion.alignment.VARIANTS', {n: VARIANTS[n] | dict(epochs=1) for n in ('AdamW', 'SGD')})
    assert {r['training'] for r in training_rows(tiny, 'digits:0-1', only='', examples=32)} == {'AdamW', 'SGD'}


def test_predictions_go_with_one_expert_alone(tiny):
    rows = prediction_rows(tiny, specs=('soft_soup()', 'task_arithmetic(lam=0.0)'), groups=(['digits:0-1'], list(tiny.tasks)))
    one = [r for r in rows if r['tasks'] == 1 and r['method'] == 'soft_soup()']
    assert len(one) == 1 and one[0]['predicted'] < 1e-5 and one[0]['disagree'] == 0 and one[0]['lost'] == 0
    base = [r for r in rows if r['method'] == 'task_arithmetic(lam=0.0)']
    assert all(abs(r['predicted'] - 1) < 1e-5 for r in base)
