"""Buffers for a device decoder's results that show what it did not write."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.device_decoder import DeviceDecoder


def poisoned_outputs(decoder: DeviceDecoder, lines: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`decoder.outputs`, full of what no search writes."""
    tokens, log_probs, lengths = decoder.outputs(lines, steps)
    return tokens.fill_(-7), log_probs.fill_(torch.nan), lengths.fill_(-7)
