"Set before torch is imported: one thread, no display, no model hub."
import os

for name, value in {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'MPLBACKEND': 'agg', 'HF_HUB_OFFLINE': '1',
                    'TOKENIZERS_PARALLELISM': 'false'}.items(): os.environ.setdefault(name, value)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run notebook cells marked `#| slow` as well')
