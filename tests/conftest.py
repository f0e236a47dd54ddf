"""Hypothesis profiles: dev (default, quick), ci, thorough. Choose: pytest --hypothesis-profile=ci

`ci` draws the same examples every time, so that a failure is never a matter of luck. `mutants`,
for mutate.py, stops at the first failure instead of looking for a smaller one.
"""

import os
import signal

for name in ("SIGINT", "SIGHUP", "SIGTERM"):  # what a background job ignores, its children do too
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy; small products, quick tests

import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from rt_scratch import dispatch  # noqa: E402
from rt_scratch.kernels import gemm  # noqa: E402

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=50, **common)
settings.register_profile("ci", max_examples=100, derandomize=True, **common)
settings.register_profile("mutants", max_examples=30, derandomize=True,
                          phases=[Phase.explicit, Phase.generate], **common)
settings.register_profile("thorough", max_examples=1000, **common)
settings.load_profile("dev")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="signals in tests/faults (default 4)")
    parser.addoption("--flips", type=int, default=60,
                     help="damaged inputs in tests/faults (default 60)")


@pytest.fixture(autouse=True)
def no_twins_left():
    """Tests start with the plain functions and full precision: a script run in a test, or in a
    fixture of a module, registers faster twins and may choose TF32."""
    for table in dispatch.twins.values():
        table.clear()
    gemm.use_tf32(False)
