"""Scratch: quick check and bench of the variants built by try_attention.sh."""

import importlib
import sys
import time

import torch

from profiling.attention_sm90 import errors, flash, graph_milliseconds, run


def where_wrong(module, qkv):
    """What a wrong result looks like: which part of the kernel to suspect."""
    exact_probe = torch.zeros_like(qkv)
    b, s, _, h, d = qkv.shape

    def show(name, x, expected):
        _, _, out = errors(module, x)
        bad = ((out.float() - expected).abs() > 0.02 * expected.abs().clamp(min=1)) | out.isnan()
        print(f"  probe {name}: {bad.float().mean().item():.1%} wrong")
        if bad.any():
            at = bad.nonzero()[0].tolist()
            print(
                f"    first at [b, s, h*d] = {at}: {out[tuple(at)].item()} for {expected[tuple(at)].item()}"
            )
            print("    row there, 0..15:", [round(v, 2) for v in out[at[0], at[1], :16].tolist()])
            print("    wrong rows:", bad.any(-1)[at[0]].nonzero().flatten().tolist()[:24])

    x = exact_probe.clone()
    x[:, :, 2] = 1
    show("Q = K = 0, V = 1 (sums, tail mask)", x, torch.ones(b, s, h * d, device="cuda"))
    x[:, :, 2] = torch.arange(d, device="cuda", dtype=x.dtype)
    show(
        "Q = K = 0, V = column (V's columns)",
        x,
        torch.arange(d, device="cuda").float().repeat(h).expand(b, s, h * d),
    )
    x[:, :, :2] = (
        torch.nn.functional.normalize(torch.randn(b, s, 1, h, d, device="cuda"), dim=-1).to(x.dtype) * 40
    )
    x[:, :, 2] = torch.arange(s, device="cuda", dtype=x.dtype)[None, :, None, None]
    show(
        "Q = K long, V = row: row i gives i (order of queries and keys)",
        x,
        torch.arange(s, device="cuda").float()[None, :, None].expand(b, s, h * d),
    )


def check(name):
    module = importlib.import_module(name)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [
        (1, 64, 1),
        (1, 1, 3),
        (1, 59, 1),
        (1, 128, 1),
        (1, 129, 1),
        (1, 577, 1),
        (1, 578, 6),
        (3, 578, 6),
        (3, 577, 12),
    ]
    cases += [(2, s, 3) for s in (97, 208, 209, 257, 592, 593, 640, 641, 1025)] + [
        (16, 578, 12),
        (24, 578, 16),
    ]
    for dtype in (torch.float16, torch.bfloat16):
        for b, s, h in cases:
            for scale in (1.0, 8.0):
                torch.manual_seed(s)
                qkv = (scale * torch.randn(b, s, 3, h, 64, device="cuda")).to(dtype)
                error, bound, out = errors(module, qkv)
                again = errors(module, qkv)[2]
                if not (error <= bound and torch.equal(out, again)):
                    print(
                        f"{name}: WRONG at B={b} S={s} H={h} {dtype} scale {scale}: error {error:.3g}, bound {bound:.3g},"
                    )
                    print(
                        f"  NaN {out.isnan().float().mean().item():.1%}, same twice: {torch.equal(out, again)}",
                        flush=True,
                    )
                    where_wrong(module, qkv)
                    sys.exit(1)
    print(f"{name}: all right (last error {error:.2g}, bound {bound:.2g})")


def bench(names):
    modules = [importlib.import_module(name) for name in names]
    print(
        "us (TFLOP/s), S = 578, fp16; columns:",
        "flash",
        *(n.removeprefix("attention_") for n in names),
        "first with dependent launch",
    )
    begun = time.time()
    for heads, batch in ((12, 64), (6, 64), (12, 16), (6, 16), (6, 8), (16, 8), (6, 1), (12, 1), (16, 1)):
        if time.time() - begun > 25:
            break
        copies = max(2, min(12, (200 << 20) // (batch * heads * 578 * 384)))
        x = torch.randn(copies, batch, 578, 3, heads, 64, device="cuda", dtype=torch.float16)
        out = torch.empty(copies, batch, 578, heads * 64, device="cuda", dtype=torch.float16)
        apart = [[t.contiguous() for t in y.permute(2, 0, 3, 1, 4)] for y in x]
        times = [graph_milliseconds([lambda a=a: flash(*a) for a in apart], 5)]
        for module in modules:
            times.append(
                graph_milliseconds([lambda i=i, m=module: run(m, x[i], out[i]) for i in range(copies)], 5)
            )
        last = modules[0]
        times.append(
            graph_milliseconds([lambda i=i: run(last, x[i], out[i], True) for i in range(copies)], 5)
        )
        work = 4 * 578**2 * 64 * heads * batch / 1e9
        print(
            f"H={heads:2} B={batch:2} ",
            "  ".join(f"{t * 1e3:7.1f} ({work / t:3.0f})" for t in times),
            flush=True,
        )


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "check" else bench(sys.argv[2:])
