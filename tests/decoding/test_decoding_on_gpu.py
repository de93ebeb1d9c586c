"""Jacobi decoding on a GPU equals generate there, token for token in fp32."""

import json
from pathlib import Path

import pytest
import torch

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.comparison import load_model
from cllm_kernels.spider import prompt_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
MODEL = Path(__file__).parents[2] / "models" / "spider-cllm"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["window", "block"])
def test_equals_generate(mode, backend):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_model(MODEL)
    model.to("cuda")
    questions = [json.loads(line) for line in (MODEL / "held_out_sample.jsonl").read_text().splitlines()]
    generator = JacobiGenerator(model, JacobiConfig(block_size=16, mode=mode, backend=backend))
    for row in questions[:24]:
        inputs = tokenizer(prompt_for(row), return_tensors="pt", return_token_type_ids=False).to("cuda")
        want = model.generate(**inputs, do_sample=False, max_new_tokens=128)
        got = generator.generate(**inputs, do_sample=False, max_new_tokens=128)
        assert torch.equal(got, want), prompt_for(row)
        assert generator.statistics.backend == backend
