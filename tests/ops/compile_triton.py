"""Compiles Triton's kernels for GPUs that need not be there, and prints what each takes as JSON lines.

    python tests/ops/compile_triton.py

Run by test_triton_compile.py, in a process of its own, because there the kernels are compiled and not interpreted.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re

os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cllm_kernels.triton import append_kv, block_attention, configs, converge, lm_head_argmax, rms_norm, silu_mul

INT64 = ("seeds", "window", "output", "context", "eos", "keys", "indices")
STORED = (
    "query", "key_cache", "value_cache", "key", "value", "out", "logits", "cos", "sin", "hidden", "weight", "bias",
    "x", "delta", "total", "gate", "up",
)  # fmt: skip
ELEMENTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def source(kernel, element, constants):
    """The kernel as a call would specialise it: pointers and strides are multiples of 16."""
    signature, divisible = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        if name in ("scale", "cap", "inverse_temperature", "eps"):
            signature[name] = "fp32"
            continue
        if name in STORED:
            signature[name] = f"*{element}"
        elif name in ("sinks", "lse", "partial_out", "partial_lse", "values"):
            signature[name] = "*fp32"
        elif re.fullmatch(r"[a-z]+\d|\w+_stride|kv_heads|vocabulary|size|count", name) or parameter.do_not_specialize:
            signature[name] = "i32"
        else:
            signature[name] = "*i64" if name in INT64 else "*i32"
        if not parameter.do_not_specialize and name != "kv_heads":
            divisible[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {name: constants[name] for name in signature if signature[name] == "constexpr"}, divisible)


def attention(dim, element, config, **options):
    pad = configs.padded_dim(dim)
    constants = dict(GROUP=4, DIM=dim, VALUE_DIM=dim, PAD=pad, VALUE_PAD=pad, ROWS=config.block_rows,
                     KEYS=config.block_keys, MASKED_KEYS=configs.masked_keys(config), SPLITS=64, WINDOWED=False, BRANCHED=False, SOFTCAP=False, SINKS=False) | options  # fmt: skip
    return block_attention._attend, element, constants, config.warps, config.stages


def cases():
    """(name, kernel, element, constants, warps, stages), and whether for every architecture."""
    for dim, size, config in configs.attention_configs():
        element = "bf16" if size == 2 else "fp32"
        yield f"attend D={dim} {element} {config}", *attention(dim, element, config), True
    for dim in (64, 80, 96, 128, 256):
        for element, dtype in ELEMENTS.items():
            config = configs.attention_config(dim, dim, dtype, 64)
            everything = dict(SPLITS=1, WINDOWED=True, BRANCHED=True, SOFTCAP=True, SINKS=True)
            yield f"attend D={dim} {element} window, branches, cap, sinks", *attention(dim, element, config, **everything), False
        pad = configs.padded_dim(dim)
        for splits in (4, 64):
            constants = dict(GROUP=7, VALUE_DIM=dim, VALUE_PAD=pad, ROWS=configs.merge_rows(splits, pad, 112),
                             SPLITS=splits, SINKS=False)  # fmt: skip
            yield f"merge D={dim} splits={splits}", block_attention._merge, "bf16", constants, 4, 3, dim == 128
        constants = dict(DIM=dim, VALUE_DIM=dim, PAD=pad, VALUE_PAD=pad, TOKENS=append_kv.TOKENS)
        for rotary, query in ((0, False), (dim, False), (dim, True)):
            name = f"append D={dim} R={rotary}{' with queries' if query else ''}"
            turned = dict(ROTARY=rotary, HALF_PAD=configs.next_power(max(1, rotary // 2)), QUERY=query)
            yield name, append_kv._append, "bf16", constants | turned, 4, 3, dim == 128
    for element in ELEMENTS:
        for sample in (False, True):
            constants = dict(SPLIT=configs.ARGMAX_SPLIT, BLOCK=configs.ARGMAX_BLOCK, SAMPLE=sample)
            name = f"{'sample' if sample else 'argmax'} {element}"
            yield name, converge._argmax, element, constants, configs.ARGMAX_WARPS, 3, True
    for size, config in configs.lm_head_configs():
        element = "bf16" if size == 2 else "fp32"
        tile = dict(VOCABULARY=config.block_vocabulary, TOKENS=config.block_tokens, DEPTH=config.block_depth)
        for name, on in (("", False), (" bias, scale, cap", True)):
            constants = tile | dict(BIAS=on, SCALE=on, SOFTCAP=on)
            yield (f"lm_head {element} {config}{name}", lm_head_argmax._argmax, element, constants, config.warps,
                   config.stages, not on or config.block_tokens == 16)  # fmt: skip
    for element in ELEMENTS:
        yield f"silu_mul {element}", silu_mul._silu_mul, element, dict(BLOCK=silu_mul.BLOCK), 4, 3, True
        for size in (128, 896, 4096, 8192):
            pad = configs.next_power(size)
            constants = dict(ADD=size != 128, PAD=pad)
            yield f"norm {size} {element}", rms_norm._rms_norm, element, constants, configs.norm_warps(pad), 3, size == 4096
    yield "lm_head join", lm_head_argmax._join, "bf16", dict(JOINED=lm_head_argmax.JOINED), 4, 3, True
    for rows, width, block_mode, context in ((1, 16, False, True), (64, 16, True, False), (8, 128, False, True)):
        constants = dict(ROWS=configs.converge_rows(width, rows), WIDTH=width, BLOCK_MODE=block_mode, CONTEXT=context)
        yield f"converge n={width} B={rows}", converge._converge, "bf16", constants, 4, 3, True


def compile_case(job):
    index, arch = job
    name, kernel, element, constants, warps, stages, _ = list(cases())[index]
    log = io.StringIO()
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel is not append_kv._append}
        compiled = triton.compile(source(kernel, element, constants), GPUTarget("cuda", arch, 32), options)
    text = log.getvalue()
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", text)]
    registers = re.search(r"Used (\d+) registers", text)
    return {
        "name": name, "arch": arch, "cubin": len(compiled.asm["cubin"]), "shared": compiled.metadata.shared,
        "warps": warps, "registers": int(registers[1]), "spilled": sum(spilled), "ptxas_reports": len(spilled),
    }  # fmt: skip


def compile_all():
    """What `compile_case` gives for every case and architecture, as they become ready."""
    jobs = [(index, arch) for index, case in enumerate(cases()) for arch in configs.ARCHITECTURES if case[-1] or arch == 90]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(compile_case, jobs)


if __name__ == "__main__":
    for row in compile_all():
        print(json.dumps(row), flush=True)
