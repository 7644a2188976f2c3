"""Any call of any public op, as hypothesis thinks of it, against its definition in float64.

A few calls of each here; 10,120 on the CPU and 300 on Triton's interpreter with `--hypothesis-profile=thorough`.
"""

import any_attention_calls
import any_vocabulary_calls
import pytest
from any_calls import Drawing, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_empty")

OPS = any_attention_calls.OPS | any_vocabulary_calls.OPS
THOROUGH = settings.get_current_profile_name() == "thorough"
CALLS, INTERPRETED = (920, 30) if THOROUGH else (12, 2)
OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": not THOROUGH, "database": None}
OPTIONS |= {"phases": [Phase.generate], "report_multiple_bugs": False}  # told as it was drawn: shrinking takes minutes


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=CALLS, **OPTIONS)
@given(st.data())
def test_any_call_on_the_cpu(op, data):
    check(OPS[op](Drawing(data.draw, ["torch", "cpp", "cpp", None])))


@pytest.mark.parametrize("op", [op for op in OPS if op != "generalized_jsd_loss"])  # which has no choice of a backend
@settings(max_examples=INTERPRETED, **OPTIONS)
@given(st.data())
def test_any_call_on_triton(op, data):
    check(OPS[op](Drawing(data.draw, ["triton"])))
