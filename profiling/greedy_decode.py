"""The greedy decode kernel: correctness and time a token of the published decoders, in one run.

    python -m profiling.greedy_decode [--models small,base,tiny] [--batches 1,8,16,64] [--tokens 20]

Decoders have random weights and random encoder keys and values. Every text has exactly `--tokens` tokens: no
id ends it. Times are medians of CUDA-graph replays. The byte floor is 2 [L (6 D^2 + 2 D F) + V D] +
B 4 L D (S + t) bytes a step, at 4.5 TB/s: every weight and every key and value once.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch import Tensor, nn
from transformers import TrOCRConfig, TrOCRForCausalLM

from graph_surgery.architectures import DECODER_GELU, DECODER_SMALL
from profiling.kernel_calls import load_kernels
from runtime.greedy_weights import GreedyDecode, decoder_shape, pack_decoder, plan, position_table

BANDWIDTH = 4.5e12  # bytes a second
START_ID, PAD_ID = 2, 1

# name -> decoder, length of the encoder's states
DECODERS = {
    "tiny": (DECODER_SMALL | {"vocab_size": 102}, 578),
    "small": (DECODER_SMALL, 578),
    "base": (DECODER_GELU, 577),  # large's decoder is the same
}


def random_decoder(config: dict, dtype: torch.dtype, device: str, seed: int = 0) -> TrOCRForCausalLM:
    """Activations stay near 1 and logits differ clearly; biases and LayerNorms are not trivial."""
    model = TrOCRForCausalLM(
        TrOCRConfig(**config, cross_attention_hidden_size=config["d_model"], attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(0, 0.1, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    weight += 1
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        model.output_projection.weight *= 4
    return model.to(device, dtype).eval()


def random_cross(model: TrOCRForCausalLM, batch: int, length: int, seed: int = 0) -> list[list[Tensor]]:
    """Keys and values of every layer, T [B, H, S, d]."""
    config = model.config
    shape = (
        batch,
        config.decoder_attention_heads,
        length,
        config.d_model // config.decoder_attention_heads,
    )
    generator = torch.Generator(model.device).manual_seed(seed)
    return [
        [
            torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
            for _ in range(config.decoder_layers)
        ]
        for _ in range(2)
    ]


class GreedyReference:
    """Greedy search step by step in plain PyTorch, in the decoder's type.

    Attributes as GreedyDecode's, and `margins` [B, max_steps]: the best logit minus the second, infinite
    behind a row's end.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: TrOCRForCausalLM,
        cross: list[list[Tensor]],
        max_steps: int,
        start_id: int,
        pad_id: int,
        end_ids: list[int],
    ):
        decoder, head_dim = model.model.decoder, cross[0][0].shape[-1]
        batch, heads, device = len(cross[0][0]), cross[0][0].shape[1], model.device
        positions = position_table(decoder.embed_positions)
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.layers)
        tokens = torch.full((batch,), start_id, device=device)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)
        ends = torch.tensor(end_ids, device=device, dtype=torch.int64)
        self.token_ids = torch.full((batch, 1 + max_steps), pad_id, dtype=torch.int32, device=device)
        self.token_ids[:, 0] = start_id
        self.log_probs = torch.zeros(batch, max_steps, device=device)
        self.margins = torch.full((batch, max_steps), torch.inf, device=device)
        self.steps = 0

        def attend(attention: nn.Module, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = (attention.q_proj(x) * attention.scaling).view(batch, heads, 1, head_dim)
            context = (query @ key.transpose(2, 3)).softmax(-1) @ value
            return attention.out_proj(context.view(batch, 1, heads * head_dim))

        while self.steps < max_steps and not ended.all():
            x = decoder.embed_tokens(tokens[:, None]) + positions[self.steps]
            if decoder.layernorm_embedding is not None:
                x = decoder.layernorm_embedding(x)
            for index, layer in enumerate(decoder.layers):
                attention = layer.self_attn
                new = [p(x).view(batch, heads, 1, head_dim) for p in (attention.k_proj, attention.v_proj)]
                if past[index] is not None:
                    new = [torch.cat(pair, 2) for pair in zip(past[index], new, strict=True)]
                past[index] = tuple(new)
                x = layer.self_attn_layer_norm(x + attend(attention, x, *new))
                image = [part[index].to(x.dtype) for part in cross]
                x = layer.encoder_attn_layer_norm(x + attend(layer.encoder_attn, x, *image))
                x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
            logits = model.output_projection(x)[:, 0].float()
            best, second = logits.topk(2).values.unbind(-1)
            chosen = logits.argmax(-1)
            log_probs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            tokens = chosen.masked_fill(ended, pad_id)
            self.margins[:, self.steps] = (best - second).masked_fill(ended, torch.inf)
            self.log_probs[:, self.steps] = log_probs.masked_fill(ended, 0)
            self.token_ids[:, self.steps + 1] = tokens
            ended = ended | torch.isin(tokens, ends)
            self.steps += 1


def differences(
    search: GreedyDecode, exact: GreedyReference, margin: float, tolerance: float
) -> tuple[list[str], float]:
    """What is wrong with the search's outputs, and the largest error of a log-probability.

    A row is compared up to its first different token; that one may differ where the exact search's margin
    between the best two tokens is below `margin`.
    """
    found, largest = [], 0.0
    for row in range(search.batch):
        got, expected = search.token_ids[row, 1:].tolist(), exact.token_ids[row, 1:].tolist()
        errors = (search.log_probs[row] - exact.log_probs[row]).abs().nan_to_num(torch.inf).tolist()
        for step, (token, right) in enumerate(zip(got, expected, strict=True)):
            if token != right:
                if exact.margins[row, step] >= margin:
                    found.append(f"row {row}, step {step}: token {token}, not {right}, by a clear margin")
                break
            largest = max(largest, errors[step])
            if errors[step] > tolerance:
                found.append(f"row {row}, step {step}: log-probability is {errors[step]:.3g} off")
                break
    if not (search.token_ids[:, 0] == exact.token_ids[:, 0]).all():
        found.append("a row does not begin with the start token")
    return found, largest


def floor_microseconds(config: dict, length: int, batch: int, tokens: int) -> float:
    layers, d, f = config["decoder_layers"], config["d_model"], config["decoder_ffn_dim"]
    weights = 2 * (layers * (6 * d * d + 2 * d * f) + config["vocab_size"] * d)
    return (weights + batch * 4 * layers * d * (length + tokens / 2)) / BANDWIDTH * 1e6


def graph_microseconds(call, replays: int = 9) -> float:
    """Median time of a replay of the captured call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default="small,base,tiny")
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    options = parser.parse_args()
    kernels = load_kernels()
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, options.dtype)
    right = True
    print(f"{torch.cuda.get_device_name()}, {options.dtype}, {options.tokens} tokens, no early stop")
    print(f"{'decoder':8}{'B':>3}{'blocks':>8}{'us/token':>10}{'floor':>8}{'of floor':>9}{'tokens/s':>10}")
    for name in options.models.split(","):
        config, length = DECODERS[name]
        model = random_decoder(config, dtype, "cuda")
        shape = decoder_shape(model, length)
        weights = pack_decoder(model, shape, plan(kernels, shape))
        exact_model = model.float()
        for batch in map(int, options.batches.split(",")):
            cross = [
                [part.to(dtype) for part in layers]
                for layers in random_cross(exact_model, batch, length, batch)
            ]
            search = GreedyDecode(kernels, weights, batch, options.tokens, START_ID, PAD_ID, [])
            search.token_ids.fill_(-1)
            search.log_probs.fill_(torch.nan)

            def call(search=search, cross=cross) -> None:
                search(*cross, torch.cuda.current_stream().cuda_stream)

            time = graph_microseconds(call) / options.tokens
            exact = GreedyReference(exact_model, cross, options.tokens, START_ID, PAD_ID, [])
            found, error = differences(search, exact, margin=0.1, tolerance=0.05)
            same = (search.token_ids == exact.token_ids).float().mean().item()
            right = right and not found
            floor = floor_microseconds(config, length, batch, options.tokens)
            teams = weights.plan.blocks // weights.plan.team_blocks
            print(
                f"{name:8}{batch:3}{teams:4}x{weights.plan.team_blocks:<3}"
                f"{time:10.1f}{floor:8.1f}{floor / time:9.0%}{batch / time * 1e6:10.0f}  "
                f"{same:.1%} of tokens, log-probabilities within {error:.1e}"
                + "".join(f"\n    WRONG: {text}" for text in found[:5]),
                flush=True,
            )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
