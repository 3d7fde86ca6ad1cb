"""The fused linear kernel against PyTorch: correctness and speed on the shapes of the encoders.

    python -m profiling.linear bench [--models small,base] [--batches 1,8,16,64] [--dtype float16]
    python -m profiling.linear chain [--models small] [--batches 1] [--with qkv=8,fc2=9]    # with tactics
    python -m profiling.linear check [--tactics 1,2,3]      # quick; prints the first failure and where it is

Needs the module `trocr_kernels` in CMake's build folder (TROCR_BUILD_DIR, by default `build`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from profiling.rates import matrix_rate
from runtime.kernels import load_kernels

kernels = load_kernels()

EPSILON = 1e-12
E4M3_MAX = 448.0
STATISTICS_WIDTH = 64
GUARD_ROWS = 3

# name -> (tokens, hidden size)
ENCODERS = {"tiny": (578, 192), "small": (578, 384), "base": (577, 768), "large": (577, 1024)}
EPILOGUES = (
    "plain",
    "bias",
    "relu",
    "gelu",
    "layernorm",
    "layernorm_gelu",
    "residual",
    "residual_statistics",
)


def encoder_products(hidden: int) -> dict[str, tuple[int, int, str]]:
    """name -> (K, N, epilogue) of the four products of a pre-LN layer."""
    return {
        "qkv": (hidden, 3 * hidden, "layernorm"),
        "projection": (hidden, hidden, "residual_statistics"),
        "fc1": (hidden, 4 * hidden, "layernorm_gelu"),
        "fc2": (4 * hidden, hidden, "residual_statistics"),
    }


def name_of(dtype: torch.dtype) -> str:
    """float16, bfloat16"""
    return str(dtype).removeprefix("torch.")


def partial_statistics(x: Tensor) -> Tensor:
    """float32 [M, K / 64, 2]: mean and sum of squared distances from it of each 64 columns of x [M, K]."""
    parts = x.double().unflatten(-1, (-1, STATISTICS_WIDTH))
    mean = parts.mean(-1)
    m2 = (parts - mean[..., None]).square().sum(-1)
    return torch.stack((mean, m2), -1).float()


def fragment_order(x: Tensor) -> Tensor:
    """The columns of x [.., K] as e4m3 tensors have them: plugins/common/fp8.cuh."""
    return x.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def logical_order(x: Tensor) -> Tensor:
    """The reverse of fragment_order."""
    return x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def quantize(x: Tensor, scale: float) -> Tensor:
    """x / scale as float8_e4m3fn in fragment order, saturating."""
    scaled = (x.float() * (1 / torch.tensor(scale))).clamp(-E4M3_MAX, E4M3_MAX)
    return fragment_order(scaled).to(torch.float8_e4m3fn).contiguous()


def dequantize(x: Tensor, scale: float) -> Tensor:
    """float32 of what `quantize` made."""
    return logical_order(x.float()) * scale


@dataclass
class Linear:
    """One problem, y = epilogue(x w^T) with x T [M, K] and w T [N, K]: inputs on the GPU, and references."""

    rows: int
    inputs: int
    outputs: int
    epilogue: str
    dtype: torch.dtype
    seed: int = 0
    y: Tensor = field(init=False)
    output_statistics: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device="cuda")
            return (values * scale + shift).to(self.dtype)

        self.normalised = self.epilogue.startswith("layernorm")
        self.activation = next((name for name in ("gelu", "relu") if name in self.epilogue), None)
        self.x = normal(self.rows, self.inputs, shift=0.5 if self.normalised else 0.0)
        self.w = normal(self.outputs, self.inputs, scale=self.inputs**-0.5)
        self.b = None if self.epilogue == "plain" else normal(self.outputs, scale=0.2)
        self.residual = normal(self.rows, self.outputs) if "residual" in self.epilogue else None
        self.weight, self.bias = self.w, None if self.b is None else self.b.float()
        self.input_statistics = self.weight_sum = None
        if self.normalised:
            self.gamma = normal(self.inputs, scale=0.1, shift=1.0)
            self.beta = normal(self.inputs, scale=0.1)
            self.weight = (self.w.float() * self.gamma.float()).to(self.dtype)
            self.bias = (self.b.double() + self.w.double() @ self.beta.double()).float()
            self.weight_sum = self.weight.double().sum(1).float()
            self.input_statistics = partial_statistics(self.x)
        if self.epilogue == "residual_statistics":
            shape = (self.rows + GUARD_ROWS, self.outputs // STATISTICS_WIDTH, 2)
            self.output_statistics = torch.empty(shape, device="cuda")
        self.y = torch.empty(self.rows + GUARD_ROWS, self.outputs, dtype=self.dtype, device="cuda")
        self.poison()

    def poison(self) -> None:
        self.y.fill_(float("nan"))
        if self.output_statistics is not None:
            self.output_statistics.fill_(float("nan"))

    def run(self, tactic: int = 0, overlap: bool = False) -> None:
        """Enqueues the kernel on PyTorch's current stream."""

        arguments = {
            name: 0 if tensor is None else tensor.data_ptr() for name, tensor in self.tensors().items()
        }
        kernels.linear(
            **arguments,
            **self.scales(),
            rows=self.rows,
            outputs=self.outputs,
            inputs=self.inputs,
            dtype=name_of(self.dtype),
            epsilon=EPSILON,
            activation=self.activation or "none",
            tactic=tactic,
            overlap_predecessor=overlap,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def tensors(self) -> dict[str, Tensor | None]:
        """The kernel's, by the names of its parameters."""
        return {
            "x": self.x,
            "weight": self.weight,
            "y": self.y,
            "bias": self.bias,
            "residual": self.residual,
            "input_statistics": self.input_statistics,
            "weight_sum": self.weight_sum,
            "output_statistics": self.output_statistics,
        }

    def scales(self) -> dict[str, float | bool]:
        """What else the kernel wants to know."""
        return {}

    def product(self) -> Tensor:
        """The product and bias alone, by cuBLAS."""
        return F.linear(self.x, self.w, self.b)

    def pytorch(self, dtype: torch.dtype) -> Tensor:
        """The same function unfused, in `dtype`."""
        x, w, b, residual = (
            None if t is None else t.to(dtype) for t in (self.x, self.w, self.b, self.residual)
        )
        if self.normalised:
            x = F.layer_norm(x, (self.inputs,), self.gamma.to(dtype), self.beta.to(dtype), EPSILON)
        y = F.linear(x, w, b)
        if self.activation:
            y = F.gelu(y) if self.activation == "gelu" else F.relu(y)
        return y if residual is None else y + residual

    def errors(self) -> list[str]:
        """What is wrong with the last run's outputs: max|y - ref| <= 2 max|PyTorch - ref| + 1e-5, with ref in
        float32, or float64 for float32; nothing outside written, statistics those of y."""
        found = []
        reference = self.pytorch(torch.float64 if self.dtype == torch.float32 else torch.float32)
        allowed = 2 * (self.pytorch(self.dtype) - reference).abs().max().item() + 1e-5
        y = self.y[: self.rows]
        error = (y - reference).abs()
        wrong = ~(error <= allowed)
        if wrong.any():
            places = wrong.nonzero()
            row, column = places[0].tolist()
            found.append(
                f"{len(places)} of {wrong.numel()} outside {allowed:.2e} "
                f"(max {error.nan_to_num(1e9).max():.3e}); "
                f"first at [{row}, {column}]: {y[row, column]:.5f}, not "
                f"{reference[row, column]:.5f}; "
                f"rows {places[:, 0].min()} to {places[:, 0].max()}, "
                f"columns {places[:, 1].min()} to {places[:, 1].max()}"
            )
        if not self.y[self.rows :].isnan().all():
            found.append("wrote behind the last row")
        if self.output_statistics is not None and not wrong.any():
            expected = partial_statistics(y)
            got = self.output_statistics[: self.rows]
            if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                place = tuple((~torch.isclose(got, expected, rtol=1e-4, atol=1e-5)).nonzero()[0].tolist())
                found.append(f"statistics at {place}: {got[place]}, not {expected[place]}")
            if not self.output_statistics[self.rows :].isnan().all():
                found.append("wrote statistics behind the last row")
        return found

    def __str__(self) -> str:
        return f"{self.epilogue} M={self.rows} K={self.inputs} N={self.outputs} {name_of(self.dtype)}"


@dataclass
class E4m3Linear(Linear):
    """The same with x and w rounded to e4m3; y is e4m3 behind a GELU, and has an e4m3 copy where statistics
    are wanted. `dtype` is float16."""

    quantized: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x_scale, self.weight_scale = (t.abs().max().item() / E4M3_MAX for t in (self.x, self.weight))
        self.x8, self.weight8 = quantize(self.x, self.x_scale), quantize(self.weight, self.weight_scale)
        self.exact = dequantize(self.x8, self.x_scale), dequantize(self.weight8, self.weight_scale)
        if self.normalised:
            self.weight_sum = self.exact[1].double().sum(1).float()
        self.output_scale = 0.0
        if self.activation == "gelu" or self.output_statistics is not None:
            self.output_scale = self.reference().abs().max().item() / E4M3_MAX
            self.quantized = torch.full(
                (self.rows + GUARD_ROWS, self.outputs), 255, dtype=torch.uint8, device="cuda"
            )

    def tensors(self) -> dict[str, Tensor | None]:
        tensors = super().tensors() | {"x": self.x8, "weight": self.weight8, "quantized": self.quantized}
        return tensors | ({"y": None} if self.activation == "gelu" else {})

    def scales(self) -> dict[str, float | bool]:
        return {
            "e4m3": True,
            "product_scale": self.x_scale * self.weight_scale,
            "output_scale": self.output_scale,
        }

    def product(self) -> Tensor:
        one = torch.ones((), device="cuda")
        return torch._scaled_mm(
            self.x8, self.weight8.T, scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=True
        )

    def reference(self) -> Tensor:
        """float32 [M, N], of the rounded operands."""
        x, weight = self.exact
        y = x @ weight.T
        if self.normalised:
            wide = self.x.float()
            deviation = (wide.var(-1, unbiased=False, keepdim=True) + EPSILON).sqrt()
            y = (y - wide.mean(-1, keepdim=True) * self.weight_sum) / deviation
        y = y if self.bias is None else y + self.bias
        if self.activation:
            y = F.gelu(y) if self.activation == "gelu" else F.relu(y)
        return y if self.residual is None else y + self.residual.float()

    def errors(self) -> list[str]:
        """What is wrong with the last run's outputs. The tensor cores keep some 14 bits of a sum of e4m3
        products: with K up to 4096 that was off by up to 0.5 % of the largest output."""
        reference = self.reference()
        allowed = 1e-2 * reference.abs().max()
        found = []
        if self.activation == "gelu":
            y = dequantize(self.quantized[: self.rows].view(torch.float8_e4m3fn), self.output_scale)
            # Half of the last of four bits, of subnormals half of 2^-9.
            allowed = allowed + (reference.abs() / 16).clamp(min=self.output_scale / 1024)
        else:
            y = self.y[: self.rows].float()
        error = (y - reference).abs()
        wrong = ~(error <= allowed)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            found.append(
                f"{wrong.sum()} of {wrong.numel()} differ, first at [{row}, {column}]: "
                f"{y[row, column]:.5f}, not {reference[row, column]:.5f}; "
                f"at most {error.nan_to_num(1e9).max():.3e}"
            )
        if self.activation != "gelu" and not self.y[self.rows :].isnan().all():
            found.append("wrote behind the last row")
        if self.quantized is not None and not (self.quantized[self.rows :] == 255).all():
            found.append("wrote e4m3 behind the last row")
        if self.output_statistics is not None and not found:
            expected = partial_statistics(self.y[: self.rows])
            if not torch.allclose(self.output_statistics[: self.rows], expected, rtol=1e-4, atol=1e-5):
                found.append("statistics differ")
            copy = quantize(self.y[: self.rows], self.output_scale).view(torch.uint8)
            if differ := (copy != self.quantized[: self.rows]).sum().item():
                found.append(f"{differ} of {copy.numel()} e4m3 values are not those of y")
        return found

    def __str__(self) -> str:
        return f"{self.epilogue} M={self.rows} K={self.inputs} N={self.outputs} e4m3"


def make(rows: int, inputs: int, outputs: int, epilogue: str, dtype: str) -> Linear:
    """The problem of that type, which may be e4m3."""
    if dtype == "e4m3":
        return E4m3Linear(rows, inputs, outputs, epilogue, torch.float16)
    return Linear(rows, inputs, outputs, epilogue, getattr(torch, dtype))


def microseconds(launch: Callable[[], object], budget: float = 2000.0) -> float:
    """Median time of one launch in replays of a CUDA graph of several, on warm caches."""
    stream = torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        launch()
        start.record()
        for _ in range(3):
            launch()
        end.record()
        end.synchronize()
        count = max(3, min(50, int(budget / max(1.0, start.elapsed_time(end) * 1000 / 3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                launch()
        times = []
        for _ in range(6):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times[1:])


def bench(models: list[str], batches: list[int], dtype: str) -> bool:
    """Prints one line a product; returns whether all outputs were right."""
    rate = matrix_rate(torch.float16 if dtype == "e4m3" else getattr(torch, dtype))
    name = torch.cuda.get_device_name()
    print(f"{name}, {dtype}: 8192^3 product {rate:.0f} TFLOP/s; times in us, graph replays")
    print(
        f"{'model':6}{'B':>3} {'product':11}{'M':>6}{'K':>5}{'N':>5}{'cuBLAS':>8}{'unfused':>9}{'ours':>8}"
        f"{'overlap':>8}{'TFLOP/s':>8}{'of rate':>8}  best tactic: us; all"
    )
    right = True
    for model in models:
        tokens, hidden = ENCODERS[model]
        for batch in batches:
            for product, (inputs, outputs, epilogue) in encoder_products(hidden).items():
                problem = make(batch * tokens, inputs, outputs, epilogue, dtype)
                problem.run()
                errors = problem.errors()
                right = right and not errors
                cublas = microseconds(problem.product)
                unfused = microseconds(lambda problem=problem: problem.pytorch(problem.dtype))
                ours = microseconds(problem.run)
                overlap = microseconds(lambda problem=problem: problem.run(overlap=True))
                tactics = {}
                for tactic in range(1, kernels.linear_tactic_count() + 1):
                    try:
                        problem.run(tactic)
                    except RuntimeError:
                        continue
                    tactics[tactic] = microseconds(
                        lambda problem=problem, tactic=tactic: problem.run(tactic, overlap=True), 800
                    )
                best = min(tactics, key=tactics.get)
                achieved = 2 * problem.rows * inputs * outputs / ours / 1e6
                print(
                    f"{model:6}{batch:3} {product:11}{problem.rows:6}{inputs:5}{outputs:5}"
                    f"{cublas:8.2f}{unfused:9.2f}{ours:8.2f}{overlap:8.2f}{achieved:8.0f}"
                    f"{achieved / rate:8.1%}  {best:2}: {tactics[best]:.2f}; "
                    + " ".join(f"{time:.1f}" for time in tactics.values())
                    + "".join(f"\n    WRONG: {error}" for error in errors),
                    flush=True,
                )
    return right


def chain(
    models: list[str], batches: list[int], dtype: torch.dtype, tactics: dict[str, int], layers: int = 12
) -> None:
    """Print, a line a model and batch, microseconds of an encoder layer of `layers` layers in a row.

    As in an engine: each kernel reads what the one before wrote, and starts while that ends; attention
    stands between QKV and projection; every layer has weights of its own. `tactics` are by the names of the
    products; 0 or absent: by cost.
    """
    chosen = ", ".join(f"{name} tactic {tactic}" for name, tactic in tactics.items()) or "tactics by cost"
    print(f"{torch.cuda.get_device_name()}, {name_of(dtype)}: us a layer, dependent launch, {chosen}")
    names = f"{'model':6}{'B':>3}{'layer':>9}{'qkv':>8}{'projection':>11}{'fc1':>8}{'fc2':>8}"
    print(f"{names}  (alone, not overlapped)")
    for model in models:
        tokens, hidden = ENCODERS[model]
        for batch in batches:
            products = {
                name: Linear(batch * tokens, inputs, outputs, epilogue, dtype)
                for name, (inputs, outputs, epilogue) in encoder_products(hidden).items()
            }
            qkv, projection, fc1, fc2 = products.values()
            # The residual stream alternates between two buffers.
            projection.x = torch.empty(projection.rows, hidden, dtype=dtype, device="cuda")
            projection.residual = fc2.y[: fc2.rows]
            fc1.x, fc1.input_statistics = projection.y[: fc1.rows], projection.output_statistics
            fc2.x, fc2.residual = fc1.y[: fc2.rows], projection.y[: fc2.rows]
            qkv.x, qkv.input_statistics = fc2.y[: qkv.rows], fc2.output_statistics
            weights = {
                name: [product.weight.clone() for _ in range(layers)] for name, product in products.items()
            }
            attention = partial(
                kernels.encoder_attention,
                qkv.y.data_ptr(),
                projection.x.data_ptr(),
                batch=batch,
                sequence_length=tokens,
                num_heads=hidden // 64,
                head_dim=64,
                dtype=name_of(dtype),
            )

            def launch(products=products, weights=weights, attention=attention) -> None:
                for layer in range(layers):
                    for name, product in products.items():
                        product.weight = weights[name][layer]
                        product.run(tactics.get(name, 0), overlap=True)
                        if name == "qkv":
                            attention(stream=torch.cuda.current_stream().cuda_stream)

            for product in products.values():
                product.y.normal_()
                if product.output_statistics is not None:
                    product.output_statistics.fill_(1.0)
            layer = microseconds(launch) / layers
            alone = [
                microseconds(partial(product.run, tactics.get(name, 0))) for name, product in products.items()
            ]
            print(
                f"{model:6}{batch:3}{layer:9.2f}{alone[0]:8.2f}{alone[1]:11.2f}{alone[2]:8.2f}{alone[3]:8.2f}",
                flush=True,
            )


def tactics_by_product(text: str) -> dict[str, int]:
    """qkv=8,fc2=9 -> {"qkv": 8, "fc2": 9}. Raises argparse.ArgumentTypeError for what is none of these."""
    products = encoder_products(64)
    found = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in products or not number.isdigit():
            raise argparse.ArgumentTypeError(
                f"{part!r} is no product and tactic; write {'=N,'.join(products)}=N, or some of them"
            )
        found[name] = int(number)
    return found


def check(tactics: list[int]) -> bool:
    """A quick look at some tactics, from easy to hard; stops at the first failure."""
    cases = [
        (128, 64, 192, "plain"),
        (128, 384, 192, "plain"),
        (577, 384, 384, "bias"),
        (577, 384, 1152, "layernorm"),
        (578, 384, 1536, "layernorm_gelu"),
        (578, 1536, 384, "residual"),
        (578, 1536, 384, "residual_statistics"),
        (1, 192, 768, "relu"),
        (63, 200, 72, "gelu"),
        (4624, 768, 768, "residual_statistics"),
        (4616, 1024, 4096, "layernorm_gelu"),
    ]
    for tactic in tactics:
        for dtype in (torch.float16, torch.bfloat16):
            for rows, inputs, outputs, epilogue in cases:
                problem = Linear(rows, inputs, outputs, epilogue, dtype)
                print(f"tactic {tactic}: {problem}", end=" ", flush=True)
                try:
                    problem.run(tactic)
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    if "invalid argument" in str(error):
                        print("not for this tactic")
                        continue
                    raise
                if errors := problem.errors():
                    print("FAILED:", "; ".join(errors))
                    return False
                print("ok")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("bench", "chain", "check"))
    parser.add_argument("--models", default="small,base,large,tiny")
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "e4m3"), default="float16")
    parser.add_argument("--tactics", default="0", help="of check")
    parser.add_argument("--with", dest="chosen", type=tactics_by_product, default={}, help="tactics of chain")
    arguments = parser.parse_args()
    if arguments.what == "check":
        right = check([int(tactic) for tactic in arguments.tactics.split(",")])
    elif arguments.what == "chain" and arguments.dtype == "e4m3":
        parser.error("chain is of float16 and bfloat16")
    else:
        models = arguments.models.split(",")
        batches = [int(batch) for batch in arguments.batches.split(",")]
        if arguments.what == "bench":
            right = bench(models, batches, arguments.dtype)
        else:
            chain(models, batches, getattr(torch, arguments.dtype), arguments.chosen)
            right = True
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
