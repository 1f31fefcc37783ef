"Every notebook that defines, shows or teaches something runs top to bottom, all in this process: torch is imported once."
import os
import signal
from pathlib import Path

import pytest
from nbdev import test as nbdev_test
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted([*NBS.glob('[0-9]*.ipynb'), *NBS.glob('index.ipynb'), *NBS.glob('tutorials/*.ipynb')])


@pytest.fixture
def as_before():
    "nbdev takes over Ctrl-C; a notebook may leave figures open, variables set and methods registered: undo it."
    from direction_fusion.methods import METHODS
    handler, here, env, methods = signal.getsignal(signal.SIGINT), os.getcwd(), dict(os.environ), dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(methods)
    signal.signal(signal.SIGINT, handler)
    os.chdir(here)
    os.environ.clear()
    os.environ.update(env)
    import matplotlib.pyplot as plt
    plt.close('all')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook(path, request, as_before):
    flags = get_config(ROOT).tst_flags
    skip = [] if request.config.getoption('--slow') else flags.split() if isinstance(flags, str) else flags
    passed, _ = nbdev_test.test_nb(path, skip_flags=skip)
    if not passed: pytest.fail(f'{path.relative_to(ROOT)} stopped at the cell shown under "Captured stderr"', pytrace=False)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 1
