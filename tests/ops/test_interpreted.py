"""Every Triton kernel in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the tests run in processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# two processes, of about the same time
TESTS = {
    "convolution, delta rule, gated norm and decodes": (
        "test_causal_conv_interpreted.py",
        "test_dequantize_kernel.py",
        "test_gated_rms_norm_kernel.py",
        "test_gated_delta_rule_libraries.py::test_interpreted_normalisation",
    ),
    "norm with rope, adapters, experts and loss": (
        "test_grouped_kernels.py",
        "test_linear_cross_entropy_blocks.py::test_interpreted_kernels",
        "test_linear_cross_entropy_blocks.py::test_interpreted_kernels_without_tokens",
        "test_linear_cross_entropy_blocks.py::test_interpreted_kernels_store_16_bits",
        "test_lora_gated_kernel.py",
        "test_lora_up_backward.py::test_interpreted_kernels",
        "test_rms_norm_rope_kernel.py",
    ),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs the others")
@pytest.mark.parametrize("tests", TESTS.values(), ids=TESTS)
def test_kernels_in_the_interpreter(tests):
    pytest.importorskip("triton", reason="needs triton")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *(str(folder / t) for t in tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in tests:
        assert re.search(rf"^PASSED \S*{re.escape(name)}(::|\[|$)", done.stdout, re.MULTILINE), name
