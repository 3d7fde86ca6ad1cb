"""Every kernel of `trocr_kernels` under compute-sanitizer: memcheck, racecheck, initcheck and synccheck.

    python -m profiling.sanitize                       into results/<gpu>/sanitizer.json
    python -m profiling.sanitize --kernels linear,layernorm --tools memcheck    the other findings stay

Every kernel and tool is a process of its own, several at a time: one that hangs, or that the tool cannot
start, is a record like the others. Only this project's kernels are checked. Inputs are made on the host and
copied, so that initcheck knows them to be written, and every tensor is an allocation of its own, so that
memcheck sees the first byte behind it.

Exit codes: 0 all clean; 1 a tool found something, or did not finish; 2 no compute-sanitizer, GPU or module.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from profiling.records import ROOT, environment, update

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # compute-sanitizer's exit status where it found something
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
BARRIERS = 65536  # that synccheck keeps track of: more than a wave of blocks has
DONE = "every call was made"  # what a child prints at its end
# What a tool prints that is no finding; it counts a program that fails as an error.
NO_FINDING = re.compile(
    "COMPUTE-SANITIZER|SUMMARY|Warning:|process didn't terminate|Unified Memory from|^Target application"
)
HOST = re.compile(r"Host Frame|host backtrace")
MOST_LINES = 24  # of a tool's report, and of what the program printed, that go into the record


@dataclass(frozen=True)
class Finding:
    """What a tool said of a kernel.

    Attributes:
        status: "clean", "found" (see `report`), "failed" (the tool, or the program under it), "timed out".
        count: errors or hazards.
        report: the first lines, where it is not clean.
    """

    kernel: str
    tool: str
    status: str
    count: int
    seconds: float
    report: list[str]


# --- the calls: one function a kernel, of a few small sizes; tails that fill no block among them ---


KEPT = []  # tensors that kernels under way may use


def _on_gpu(tensor):
    KEPT.append(tensor.cuda())
    return KEPT[-1]


def _host(*shape: int, dtype: str = "float16", scale: float = 1.0):
    """A tensor on the GPU, random, copied from the host."""
    import torch

    return _on_gpu((torch.randn(shape) * scale).to(getattr(torch, dtype)))


def _zeros(*shape: int, dtype: str = "float16"):
    import torch

    return _on_gpu(torch.zeros(shape, dtype=getattr(torch, dtype)))


def encoder_attention(ops) -> None:
    import torch

    from profiling.attention_sm90 import HOPPER_PATHS

    hopper = HOPPER_PATHS if torch.cuda.get_device_capability() == (9, 0) else ("auto",)
    for batch, tokens, heads, head_dim, dtype, paths in (
        (1, 1, 2, 64, "float16", hopper),
        (2, 97, 3, 64, "float16", hopper),
        (1, 257, 2, 64, "float16", hopper),
        (1, 257, 2, 64, "bfloat16", hopper),
        (1, 578, 6, 64, "float16", hopper),
        (2, 65, 2, 32, "float16", ("auto",)),
        (1, 59, 2, 64, "float32", ("auto",)),
    ):
        qkv = _host(batch, tokens, 3 * heads * head_dim, dtype=dtype)
        for path in paths:
            ops.encoder_attention(qkv, _zeros(batch, tokens, heads * head_dim, dtype=dtype), heads, path)


def decoder_self_attention(ops) -> None:
    import torch

    for batch, heads, head_dim, capacity, dtype in (
        (1, 8, 32, 32, "float16"),
        (3, 4, 64, 128, "bfloat16"),
        (2, 3, 64, 64, "float32"),
    ):
        cache = [_host(batch, heads, capacity, head_dim, dtype=dtype) for _ in range(2)]
        qkv = _host(batch, 1, 3 * heads * head_dim, dtype=dtype)
        context = _zeros(batch, 1, heads * head_dim, dtype=dtype)
        for position in (0, capacity // 2, capacity - 1):
            positions = _on_gpu(torch.full((batch, 1), position))
            ops.decoder_self_attention(qkv, tuple(cache), positions, context, tuple(cache))


def cross_attention(ops) -> None:
    for images, beams, heads, head_dim, tokens, dtype in (
        (1, 1, 8, 32, 578, "float16"),
        (2, 3, 4, 64, 97, "bfloat16"),
        (3, 1, 2, 64, 1, "float16"),
        (2, 1, 3, 64, 59, "float32"),
    ):
        key, value = (_host(images, heads, tokens, head_dim, dtype=dtype) for _ in range(2))
        query = _host(images * beams, 1, heads * head_dim, dtype=dtype)
        ops.cross_attention(query, key, value, _zeros(images * beams, 1, heads * head_dim, dtype=dtype))


def cross_key_value(ops) -> None:
    for images, heads, head_dim, tokens, inputs, dtype in (
        (1, 8, 32, 578, 384, "float16"),
        (3, 2, 64, 59, 192, "bfloat16"),
        (2, 3, 64, 1, 64, "float16"),
        (2, 3, 32, 33, 192, "float32"),
    ):
        x = _host(images, tokens, inputs, dtype=dtype)
        weight = _host(2 * heads * head_dim, inputs, dtype=dtype, scale=inputs**-0.5)
        key, value = (_zeros(images, heads, tokens, head_dim, dtype=dtype) for _ in range(2))
        ops.cross_key_value(x, weight, _host(2 * heads * head_dim, dtype="float32"), key, value)


def layernorm(ops) -> None:
    for rows, width, dtype in (
        (1, 256, "float16"),
        (3, 1001, "bfloat16"),
        (65, 384, "float16"),
        (2, 7, "float32"),
    ):
        x, residual = (_host(rows, width, dtype=dtype) for _ in range(2))
        gamma, beta = (_host(width, dtype=dtype) for _ in range(2))
        normed, total = (_zeros(rows, width, dtype=dtype) for _ in range(2))
        ops.layernorm(x, gamma, beta, normed)
        ops.layernorm(x, gamma, beta, normed, overlap=True)
        ops.residual_layernorm(x, residual, gamma, beta, normed, total)
        ops.residual_layernorm(x, residual, gamma, beta, normed)


def bias_activation(ops) -> None:
    for rows, width, dtype in (
        (1, 1024, "float16"),
        (3, 1001, "bfloat16"),
        (65, 1536, "float16"),
        (2, 7, "float32"),
    ):
        for activation in ("gelu", "relu"):
            x, bias = _host(rows, width, dtype=dtype), _host(width, dtype=dtype)
            ops.bias_activation(x, bias, _zeros(rows, width, dtype=dtype), activation)


def linear(ops) -> None:
    """With every epilogue; the statistics' kernel with it, whose output the LayerNorm's epilogue takes."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    for rows, inputs, outputs, dtype in (
        (1, 192, 576, "float16"),
        (65, 384, 1536, "float16"),
        (130, 768, 192, "bfloat16"),
        (578, 384, 384, "float16"),
        (63, 192, 768, "float32"),
    ):
        common = {"rows": rows, "dtype": dtype, "stream": stream}
        x, weight = _host(rows, inputs, dtype=dtype), _host(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
        residual, y = _host(rows, outputs, dtype=dtype), _zeros(rows, outputs, dtype=dtype)
        bias, weight_sum = (_host(outputs, dtype="float32") for _ in range(2))
        read = _zeros(rows, inputs // 64, 2, dtype="float32")
        written = _zeros(rows, outputs // 64, 2, dtype="float32")
        ops.kernels.row_statistics(x.data_ptr(), read.data_ptr(), width=inputs, **common)
        normalised = {"input_statistics": read.data_ptr(), "weight_sum": weight_sum.data_ptr()}
        normalised |= {"epsilon": 1e-5}
        added = {"residual": residual.data_ptr()}
        for overlap in (False, True):
            for epilogue in (
                {},
                {"activation": "relu"},
                normalised,
                normalised | {"activation": "gelu"},
                added,
                added | {"output_statistics": written.data_ptr()},
            ):
                ops.kernels.linear(
                    x.data_ptr(),
                    weight.data_ptr(),
                    y.data_ptr(),
                    bias=bias.data_ptr(),
                    outputs=outputs,
                    inputs=inputs,
                    overlap_predecessor=overlap,
                    **common,
                    **epilogue,
                )


def linear_e4m3(ops) -> None:
    """Of e4m3 operands, with every epilogue, and attention's e4m3 output."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    for rows, inputs, outputs in ((1, 192, 576), (65, 384, 1536), (578, 1536, 384)):
        common = {"rows": rows, "dtype": "float16", "stream": stream}
        x = _host(rows, inputs)
        x8 = _zeros(rows, inputs, dtype="float8_e4m3fn")
        weight = _host(outputs, inputs, dtype="float8_e4m3fn", scale=inputs**-0.5)
        residual, y = _host(rows, outputs), _zeros(rows, outputs)
        bias, weight_sum = (_host(outputs, dtype="float32") for _ in range(2))
        read = _zeros(rows, inputs // 64, 2, dtype="float32")
        written = _zeros(rows, outputs // 64, 2, dtype="float32")
        quantized = _zeros(rows, outputs, dtype="float8_e4m3fn")
        ops.kernels.row_statistics(
            x.data_ptr(), read.data_ptr(), width=inputs, quantized=x8.data_ptr(), scale=0.01, **common
        )
        normalised = {"input_statistics": read.data_ptr(), "weight_sum": weight_sum.data_ptr()}
        normalised |= {"epsilon": 1e-5}
        copied = {"quantized": quantized.data_ptr(), "output_scale": 0.01}
        added = {"residual": residual.data_ptr()}
        for overlap in (False, True):
            for epilogue in (
                normalised,
                normalised | copied | {"activation": "gelu"},
                added,
                added | copied | {"output_statistics": written.data_ptr()},
            ):
                ops.kernels.linear(
                    x8.data_ptr(),
                    weight.data_ptr(),
                    0 if "activation" in epilogue else y.data_ptr(),
                    bias=bias.data_ptr(),
                    outputs=outputs,
                    inputs=inputs,
                    overlap_predecessor=overlap,
                    e4m3=True,
                    product_scale=0.01,
                    **common,
                    **epilogue,
                )
    for batch, tokens, heads, path in (
        (1, 1, 2, "divided"),
        (2, 97, 3, "hopper2"),
        (1, 578, 6, "hopper3"),
        (1, 578, 6, "divided"),
    ):
        ops.kernels.encoder_attention(
            _host(batch, tokens, 3 * heads * 64).data_ptr(),
            _zeros(batch, tokens, heads * 64, dtype="float8_e4m3fn").data_ptr(),
            batch=batch,
            sequence_length=tokens,
            num_heads=heads,
            head_dim=64,
            dtype="float16",
            output_scale=0.01,
            path=path,
            stream=stream,
        )


def patch_embedding(ops) -> None:
    import torch

    for batch, height, width, outputs, special, dtype in (
        (1, 384, 384, 192, 2, "float16"),
        (3, 64, 160, 384, 1, "bfloat16"),
        (2, 32, 48, 64, 2, "float32"),
    ):
        tokens = special + height * width // 256
        pixels = _on_gpu(torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8))
        weight, bias = _host(outputs, 768, dtype=dtype), _host(outputs, dtype="float32")
        positions, y = _host(tokens, outputs, dtype=dtype), _zeros(batch, tokens, outputs, dtype=dtype)
        statistics = _zeros(batch, tokens, outputs // 64, 2, dtype="float32")
        for address in (0, statistics.data_ptr()):
            ops.kernels.patch_embedding(
                pixels.data_ptr(),
                weight.data_ptr(),
                bias.data_ptr(),
                positions.data_ptr(),
                y.data_ptr(),
                statistics=address,
                scale=1 / 127.5,
                batch=batch,
                height=height,
                width=width,
                special_tokens=special,
                outputs=outputs,
                dtype=dtype,
                stream=torch.cuda.current_stream().cuda_stream,
            )


def reorder_cache(ops) -> None:
    import torch

    images, beams, heads, capacity, head_dim = 3, 4, 2, 32, 32
    rows = images * beams
    cache = _host(4, rows, heads, capacity, head_dim)
    chosen = torch.arange(images)[:, None] * beams + torch.randint(beams, (images, beams))
    chosen = _on_gpu(chosen.flatten())
    positions = torch.randint(capacity + 1, (images, 1)).expand(images, beams)
    positions = _on_gpu(positions.reshape(rows, 1).contiguous())
    ops.kernels.reorder_cache(
        cache.data_ptr(),
        chosen.data_ptr(),
        positions.data_ptr(),
        tensor_bytes=cache[0].nbytes,
        tensors=4,
        batch=rows,
        beams=beams,
        num_heads=heads,
        capacity=capacity,
        row_bytes=head_dim * cache.element_size(),
        stream=torch.cuda.current_stream().cuda_stream,
    )


def image_resize(ops) -> None:
    import numpy as np
    import torch

    from runtime.device_resize import DeviceResize

    random = np.random.default_rng(0)
    sizes = ((37, 211), (1, 1), (600, 50), (64, 1000))
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for filter in ("bilinear", "bicubic"):
        DeviceResize(ops.kernels, 384, 384, filter, torch.device("cuda"))(images)
        torch.cuda.synchronize()


def device_decoder(
    ops, name: str = "small", states: bool = False, beams: int = 1, slots: int = 3, e4m3: bool = False
) -> None:
    import torch

    from profiling.device_decoder import DECODERS, random_cross, random_states, random_weights
    from runtime.device_decoder import DeviceDecoder
    from runtime.search import SearchSettings

    small = {"num_layers": 2, "vocab_size": 997, "source_length": 97, "dtype": "float16"}
    config = DECODERS[name] | small
    # Made on the host: on the device another kernel would write them.
    weights = {key: value.cuda() for key, value in random_weights(config, torch.float16, "cpu").items()}
    lines = slots + 2
    decoder = DeviceDecoder(ops.kernels, weights, config, slots if beams == 1 else lines * beams, 32)
    outputs = decoder.outputs(lines, 4)
    if states:
        attended = _on_gpu(random_states(config, lines, torch.float16, "cpu"))
    else:
        cross = random_cross(config, lines, torch.float16, "cpu")
        attended = tuple(list(map(_on_gpu, tensors)) for tensors in cross)
    if e4m3:
        exact = attended
        attended = tuple([torch.zeros_like(t, dtype=torch.float8_e4m3fn) for t in of] for of in exact)
        KEPT.extend((exact, attended))
        decoder.round_to_e4m3(exact, attended)
    if beams == 1:
        decoder.run(attended, outputs, slots)
    else:
        decoder.search_beams(attended, outputs, SearchSettings(beams, no_repeat_ngram_size=2))
    torch.cuda.synchronize()


def device_decoder_wide(ops) -> None:
    """The same with heads of 64 elements, few rows: the persistent kernel."""
    device_decoder(ops, "base")


def device_decoder_wide_halves(ops) -> None:
    """More than eight rows: its form with two halves."""
    device_decoder(ops, "base", slots=11)


def device_decoder_e4m3(ops) -> None:
    """By keys and values of e4m3, which are rounded to it first."""
    device_decoder(ops, e4m3=True)


def device_decoder_wide_e4m3(ops) -> None:
    device_decoder(ops, "base", slots=11, e4m3=True)


def device_decoder_chain(ops) -> None:
    """More rows than that takes: the chain of kernels."""
    device_decoder(ops, "base", slots=17)


def device_decoder_states(ops) -> None:
    """The step of many rows, which attends to the encoder's states."""
    device_decoder(ops, "base", states=True)


def beam_search(ops) -> None:
    device_decoder(ops, beams=3)


def beam_search_wide(ops) -> None:
    """Of the step of many rows."""
    device_decoder(ops, "base", states=True, beams=3)


KERNELS: dict[str, Callable] = {
    call.__name__: call
    for call in (
        encoder_attention,
        decoder_self_attention,
        cross_attention,
        cross_key_value,
        layernorm,
        bias_activation,
        linear,
        linear_e4m3,
        patch_embedding,
        reorder_cache,
        image_resize,
        device_decoder,
        device_decoder_wide,
        device_decoder_wide_halves,
        device_decoder_e4m3,
        device_decoder_wide_e4m3,
        device_decoder_chain,
        device_decoder_states,
        beam_search,
        beam_search_wide,
    )
}


def call(kernel: str) -> None:
    """Make the kernel's calls in this process, and wait for their end."""
    import torch

    from profiling.kernel_calls import FusedOps

    torch.manual_seed(0)
    KERNELS[kernel](FusedOps())
    torch.cuda.synchronize()
    print(DONE, flush=True)


# --- the tools ---


def sanitizer_command(kernel: str, tool: str) -> list[str]:
    """compute-sanitizer on a process that makes the kernel's calls."""
    # Names are mangled: of namespace trocr. initcheck has to see what wrote the memory, whoever did.
    only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=trocr"]
    more = ["--num-cuda-barriers", str(BARRIERS)] if tool == "synccheck" else []
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *only, *more]
    return [*command, sys.executable, "-m", "profiling.sanitize", "--call", kernel]


def check(kernel: str, tool: str, seconds: float) -> Finding:
    """Run one kernel under one tool."""
    began = time.monotonic()
    # No reuse of memory between tensors, and one GPU module at a time is loaded, those that are called.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    process = subprocess.Popen(
        sanitizer_command(kernel, tool),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = None
    return judge(kernel, tool, status, output, round(time.monotonic() - began, 1))


def judge(kernel: str, tool: str, status: int | None, output: str, seconds: float) -> Finding:
    """What a run says: `status` is its exit status, None where its time was over."""
    count = sum(int(errors or hazards) for errors, hazards in SUMMARY.findall(output))
    output = output.replace(f"{ROOT}/", "")  # a result has no path of this machine
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    tool_says = [line.strip("= ") for line in lines if line.startswith("=====")]
    tool_says = [line for line in tool_says if line and not HOST.search(line)]
    program_says = [line for line in lines if not line.startswith("=====") and line != DONE]
    if count and any(not NO_FINDING.search(line) for line in tool_says):
        return Finding(kernel, tool, "found", count, seconds, tool_says[:MOST_LINES])
    if status is None:
        return Finding(kernel, tool, "timed out", 0, seconds, tool_says[:MOST_LINES])
    if status == 0 and DONE in lines and SUMMARY.search(output):
        return Finding(kernel, tool, "clean", 0, seconds, [])
    said = [*tool_says[:MOST_LINES], *program_says[-MOST_LINES:]]
    return Finding(kernel, tool, "failed", 0, seconds, said)


def table(findings: Sequence[Finding]) -> str:
    """A row a kernel, a column a tool."""
    by_place = {(finding.kernel, finding.tool): finding for finding in findings}
    tools = [tool for tool in TOOLS if any(finding.tool == tool for finding in findings)]
    rows = []
    for kernel in dict.fromkeys(finding.kernel for finding in findings):
        cells = [by_place.get((kernel, tool)) for tool in tools]
        rows.append([kernel, *(cell and cell.status + f" {cell.count}" * (cell.count > 0) for cell in cells)])
    return tabulate(rows, ["kernel", *tools], tablefmt="github", missingval="-")


def main(arguments: Sequence[str] | None = None) -> int:
    def choice(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(allowed):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}; there are {', '.join(allowed)}"
                )
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(description="Run every kernel under compute-sanitizer.")
    parser.add_argument("--kernels", type=choice(tuple(KERNELS)), default=list(KERNELS), help="default: all")
    parser.add_argument("--tools", type=choice(TOOLS), default=list(TOOLS), help="default: all")
    parser.add_argument("--seconds", type=float, default=90, help="of one process (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: results/<gpu>/sanitizer.json")
    parser.add_argument("--call", choices=KERNELS, help=argparse.SUPPRESS)  # in the child
    options = parser.parse_args(arguments)
    if options.call:
        call(options.call)
        return 0

    from runtime.gpu import current_gpu
    from runtime.kernels import load_kernels

    try:
        if shutil.which("compute-sanitizer") is None:
            raise RuntimeError("no compute-sanitizer on PATH; it comes with the CUDA toolkit")
        gpu = current_gpu()
        if gpu is None:
            raise RuntimeError("no NVIDIA GPU can be used here, and the kernels run on one only")
        load_kernels()
    except (ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    out = options.out or ROOT / "results" / gpu.slug / "sanitizer.json"
    here = asdict(
        environment(shlex.join(["python", "-m", "profiling.sanitize", *(arguments or sys.argv[1:])]))
    )
    places = [(kernel, tool) for kernel in options.kernels for tool in options.tools]
    findings = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for finding in pool.map(lambda place: check(*place, options.seconds), places):
            findings.append(finding)
            print(f"{finding.kernel} {finding.tool}: {finding.status}, {finding.seconds:.0f} s", flush=True)
            # Each, so that a run that is stopped leaves what it found.
            update(out, [asdict(finding) | here], ["kernel", "tool"], list(itertools.product(KERNELS, TOOLS)))
    print(table(findings))
    for finding in findings:
        if finding.status != "clean":
            print(f"\n{finding.kernel}, {finding.tool}: {finding.status}", *finding.report, sep="\n  ")
    return 0 if all(finding.status == "clean" for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
