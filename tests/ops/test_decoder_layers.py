"""`DecoderLayers` gives the bits of the ops that it stands for, called one after the other."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import round_alike

from cllm_kernels import backends
from cllm_kernels.ops import append_kv_, block_attention, window_mlp, window_qkv
from cllm_kernels.ops.decoder_layers import DecoderLayer, DecoderLayers

DTYPES = (torch.float32, torch.bfloat16)
HIDDEN, DIM, CAPACITY = 48, 16, 40


@pytest.fixture(autouse=True)
def native_alone(request):
    if "backend" in request.fixturenames and not request.node.callspec.params["backend"].startswith("cpp"):
        pytest.skip("it has the backend cpp alone")


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def make_layer(dtype, heads=4, kv_heads=2, extras=True, sliding_window=0, inner=72):
    def random(*shape):
        return (0.3 * torch.randn(*shape)).to(dtype)

    queries, keys = heads * DIM, kv_heads * DIM
    vectors = [random(size) for size in (queries, keys, keys, DIM, DIM)] if extras else [None] * 5
    return DecoderLayer(
        random(HIDDEN), 1e-5, random(queries, HIDDEN), random(keys, HIDDEN), random(keys, HIDDEN), *vectors, 1e-6,
        random(HIDDEN, queries), random(HIDDEN) if extras else None, random(HIDDEN), 1e-5, random(inner, HIDDEN),
        random(inner, HIDDEN), random(HIDDEN, inner), 0.2, sliding_window,
    )  # fmt: skip


def make_caches(layers, batch, dtype, capacity=CAPACITY):
    return [
        tuple(torch.randn(batch, layer.key.shape[0] // DIM, capacity, DIM).to(dtype) for _ in range(2)) for layer in layers
    ]


def make_window(batch=2, width=6, dtype=torch.float32, capacity=CAPACITY):
    """x, cos, sin, lengths and starts."""
    angles = 6 * torch.rand(batch, width, DIM // 2).repeat(1, 1, 2)
    lengths = torch.randint(5, capacity - width, (batch,), dtype=torch.int32)
    starts = torch.randint(0, 5, (batch,), dtype=torch.int32)
    return torch.randn(batch, width, HIDDEN).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype), lengths, starts


def one_by_one(layers, caches, x, cos, sin, lengths, starts, branch=0):
    for layer, cache in zip(layers, caches, strict=True):
        q, k, v = window_qkv(
            x, layer.norm, layer.eps, layer.query, layer.key, layer.value, cos, sin, layer.query_bias, layer.key_bias,
            layer.value_bias, layer.query_norm, layer.key_norm, layer.head_eps, "cpp",
        )  # fmt: skip
        cache = [tensor[: x.shape[0]] for tensor in cache]
        append_kv_(*cache, k.transpose(1, 2), v.transpose(1, 2), lengths, backend="cpp")
        attended, _ = block_attention(
            q, *cache, lengths, starts, layer.scale, layer.sliding_window, branch=branch, backend="cpp"
        )
        x = window_mlp(
            x, attended.flatten(2), layer.output, layer.mlp_norm, layer.mlp_eps, layer.gate, layer.up, layer.down,
            layer.output_bias, "cpp",
        )  # fmt: skip
    return x


def assert_same(got, want, bits):
    torch.testing.assert_close(got, want, **(dict(rtol=0, atol=0) if bits else dict(rtol=1e-5, atol=1e-5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "branch", "extras", "sliding_window"),
    [(1, 1, 0, False, 0), (1, 16, 0, False, 0), (3, 6, 0, True, 0), (3, 6, 2, True, 0), (2, 8, 0, True, 7), (3, 33, 0, False, 3)],
)
def test_bits_are_those_of_the_ops(batch, width, branch, extras, sliding_window, dtype, backend):
    layers = [make_layer(dtype, extras=extras), make_layer(dtype, 6, 3, extras, sliding_window, inner=40)]
    window, caches = make_window(batch, width, dtype), make_caches(layers, batch + 1, dtype)
    others = [tuple(tensor.clone() for tensor in cache) for cache in caches]
    before = window[0].clone()
    want = one_by_one(layers, others, *window, branch)
    got = DecoderLayers(layers, caches, DIM)(*window, branch)
    assert torch.equal(got, want) and torch.equal(window[0], before)
    for cache, other in zip(caches, others, strict=True):
        assert all(map(torch.equal, cache, other))


def test_many_tokens(backend):
    layers = [make_layer(torch.float32)]
    caches = make_caches(layers, 2, torch.float32, 700)
    window = make_window(2, 600, capacity=700)
    want = one_by_one(layers, [tuple(tensor.clone() for tensor in caches[0])], *window)
    assert torch.equal(DecoderLayers(layers, caches, DIM)(*window), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [1, 4, 6])
def test_the_last_positions_alone(keep, dtype, backend):
    layers = [make_layer(dtype) for _ in range(2)]
    window, caches = make_window(3, dtype=dtype), make_caches(layers, 3, dtype)
    others = [tuple(tensor.clone() for tensor in cache) for cache in caches]
    want = one_by_one(layers, others, *window)[:, -keep:]
    got = DecoderLayers(layers, caches, DIM)(*window, keep=keep)
    assert_same(got, want, round_alike(dtype, want.shape[0] * want.shape[1], window[0].shape[0] * window[0].shape[1]))
    for cache, other in zip(caches, others, strict=True):
        assert all(map(torch.equal, cache, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(5, 5, 9, 3), (4,), (3, 20, 20)], ids=str)
def test_rows_of_different_numbers_of_tokens(counts, dtype, backend):
    # a sliding window adds up in another order where fewer rows are asked for, so the last layer has none
    layers = [make_layer(dtype, sliding_window=4), make_layer(dtype)]
    caches = make_caches(layers, 4, dtype)
    others = [tuple(tensor.clone() for tensor in cache) for cache in caches]
    windows = [make_window(1, count, dtype) for count in counts]
    run = DecoderLayers(layers, caches, DIM)
    want = []
    for row, window in enumerate(windows):
        mine = [tuple(tensor[row : row + 1] for tensor in cache) for cache in others]
        want.append(one_by_one(layers, mine, *window)[:, -3:])
    parts = [torch.cat(tensors, 1) for tensors in list(zip(*windows, strict=True))[:3]]
    rows = [torch.cat(tensors) for tensors in list(zip(*windows, strict=True))[3:]]
    alike = round_alike(dtype, sum(counts), 3 * len(counts), *counts)
    assert_same(run(*parts, *rows, keep=3, counts=counts), torch.cat(want), alike)
    for cache, other in zip(caches, others, strict=True):
        for mine, its in zip(cache, other, strict=True):
            assert_same(mine, its, alike)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, backend):
    """Weights, caches and inputs that lie in larger tensors, and weights that share a storage."""
    layer = make_layer(dtype)
    wide = layer._replace(
        query=torch.nn.functional.pad(layer.query, (3, 5))[:, 3:-5], gate=torch.cat((layer.gate, layer.up))[: len(layer.gate)]
    )
    x, cos, sin, lengths, starts = make_window(dtype=dtype)
    caches = make_caches([layer], 2, dtype)
    by_token = [tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in caches[0])]
    want = one_by_one([layer], caches, x, cos, sin, lengths, starts)
    spread = torch.stack((lengths, starts), 1)
    window = x.transpose(0, 1).contiguous().transpose(0, 1), cos.expand(2, -1, -1), sin, spread[:, 0], spread[:, 1]
    assert torch.equal(DecoderLayers([wide], by_token, DIM)(*window), want)


def test_it_holds_what_it_was_made_of(backend):
    parameters = make_layer(torch.float32)
    parameters = parameters._replace(down=torch.nn.Parameter(parameters.down, requires_grad=False))
    window, caches = make_window(), make_caches([parameters], 2, torch.float32)
    layers = DecoderLayers([parameters], caches, DIM)
    want = layers(*window)
    parameters.down.data = torch.zeros(parameters.down.shape)  # frees the storage unless somebody holds it
    assert torch.equal(layers(*window), want)


NO_LAYERS = "there are 0 layers"
NO_FIT = "layer 1 has weights or caches of shapes, dtypes, devices or strides that do not fit"
BAD_LAYERS = {
    "norm": lambda layer: layer._replace(norm=layer.norm[1:]),
    "dtype": lambda layer: layer._replace(up=layer.up.double()),
    "inner": lambda layer: layer._replace(up=layer.up[1:]),
    "inputs of output": lambda layer: layer._replace(output=layer.output[:, 1:]),
    "heads": lambda layer: layer._replace(query=layer.query[:-1]),
    "heads of keys": lambda layer: layer._replace(query=layer.query[:DIM], output=layer.output[:, :DIM]),
    "values": lambda layer: layer._replace(value=layer.value[:-DIM]),
    "bias": lambda layer: layer._replace(output_bias=layer.output_bias[1:]),
    "strides of a bias": lambda layer: layer._replace(query_bias=layer.query_bias.repeat_interleave(2)[::2]),
    "strides of weights": lambda layer: layer._replace(gate=layer.gate.T.contiguous().T),
    "dimensions": lambda layer: layer._replace(gate=layer.gate[:, 0]),
    "head norm": lambda layer: layer._replace(key_norm=layer.key_norm[:-1]),
    "device": lambda layer: layer._replace(down=layer.down.to("meta")),
    "window": lambda layer: layer._replace(sliding_window=-1),
}


@pytest.mark.parametrize("what", BAD_LAYERS)
def test_bad_layers(what):
    layers = [make_layer(torch.float32) for _ in range(2)]
    caches = make_caches(layers, 2, torch.float32)
    with pytest.raises(ValueError, match=NO_FIT):
        DecoderLayers([layers[0], BAD_LAYERS[what](layers[1])], caches, DIM)


def test_bad_caches():
    layers = [make_layer(torch.float32) for _ in range(2)]
    caches = make_caches(layers, 2, torch.float32)
    for change in (
        lambda keys, values: (keys, values.double()),
        lambda keys, values: (keys[:1], values),
        lambda keys, values: (keys, values[:, :, :-1]),
        lambda keys, values: (keys.transpose(2, 3).contiguous().transpose(2, 3), values),
    ):
        with pytest.raises(ValueError, match=NO_FIT):
            DecoderLayers(layers, [caches[0], change(*caches[1])], DIM)
    with pytest.raises(ValueError, match=NO_LAYERS):
        DecoderLayers([], [], DIM)
    with pytest.raises(ValueError, match="2 layers, 1 caches"):
        DecoderLayers(layers, caches[:1], DIM)
    with pytest.raises(ValueError, match="D = 15; D must be even"):
        DecoderLayers(layers, caches, 15)


def halves(x, cos, sin, lengths, starts):
    return x.bfloat16(), cos, sin, lengths, starts


BAD_WINDOWS = {
    r"x is torch.bfloat16 \(2, 6, 48\) on cpu": halves,
    r"x is torch.float32 \(2, 6, 47\)": lambda x, *rest: (x[..., 1:], *rest),
    r"x is torch.float32 \(12, 48\)": lambda x, *rest: (x.flatten(0, 1), *rest),
    r"x is torch.float32 \(2, 6, 48\) on meta": lambda x, *rest: (x.to("meta"), *rest),
    r"cos \(2, 5, 16\)": lambda x, cos, *rest: (x, cos[:, 1:], *rest),
    r"sin \(2, 6, 14\)": lambda x, cos, sin, *rest: (x, cos, sin[..., 2:], *rest),
    "x has B = 4 and n = 6; the caches have room for 2 and 40": lambda *window: tuple(torch.cat((x, x)) for x in window),
    "x has B = 2 and n = 60": lambda *window: (*(torch.cat([x] * 10, 1) for x in window[:3]), *window[3:]),
    r"int32 with shape \(2,\)": lambda x, cos, sin, lengths, starts: (x, cos, sin, lengths.long(), starts),
    r"starts must be int32 with shape \(2,\)": lambda *window: (*window[:4], window[4][:1]),
    "branch is 4; it must be 0": lambda *window: (*window, 4),
    "branch is -1": lambda *window: (*window, -1),
    "branch is 3; .*, all kept": lambda *window: (*window, 3, 4),
    "keep is 7; it must be from 1 to 6": lambda *window: (*window, 0, 7),
    "keep is 0": lambda *window: (*window, 0, 0),
    "keep is 1; it must be from 1 to 0": lambda *window: (*(x[:1] for x in window[:3]), *window[3:], 0, 1, [6, 0]),
    r"counts is \[3, 3\] and branch 0; with counts, x must be \[1, 6, H\]": lambda *window: (*window, 0, 1, [3, 3]),
    r"counts is \[3, 4\]": lambda *window: (*(x[:1] for x in window[:3]), *window[3:], 0, 1, [3, 4]),
    r"counts is \[3, 3\] and branch 3": lambda *window: (*(x[:1] for x in window[:3]), *window[3:], 3, 1, [3, 3]),
    "row 1 has length 35": lambda *window: (*window[:3], torch.tensor([5, 35], dtype=torch.int32), window[4]),
    "row 0 has start -1": lambda *window: (*window[:4], torch.tensor([-1, 0], dtype=torch.int32)),
}


@pytest.mark.parametrize("message", BAD_WINDOWS, ids=lambda message: re.sub(r"\W+", "_", message))
def test_bad_windows_change_nothing(message):
    layers = [make_layer(torch.float32)]
    caches = make_caches(layers, 2, torch.float32)
    before = [tensor.clone() for tensor in caches[0]]
    run = DecoderLayers(layers, caches, DIM)
    with pytest.raises(ValueError, match=message):
        run(*BAD_WINDOWS[message](*make_window()))
    assert all(map(torch.equal, caches[0], before))


def test_without_the_extension(monkeypatch):
    layers = [make_layer(torch.float32)]
    caches = make_caches(layers, 2, torch.float32)
    monkeypatch.setattr(backends, "EXTENSION", None)
    monkeypatch.setattr(backends, "_REASON", "it is not built")
    with pytest.raises(RuntimeError, match="it is not built"):
        DecoderLayers(layers, caches, DIM)
