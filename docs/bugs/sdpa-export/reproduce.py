"""PyTorch's ONNX export of attention with a mask guards against NaN: four more nodes within the pattern."""

import io
import warnings
from collections import Counter

import onnx
import torch

warnings.simplefilter("ignore")


class Sdpa(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Eager(torch.nn.Module):
    def forward(self, q, k, v, mask):
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
mask = torch.ones(5, 5, dtype=torch.bool)
print("torch", torch.__version__)
for module in (Sdpa(), Eager()):
    file = io.BytesIO()
    torch.onnx.export(module, (*tensors, mask), file, dynamo=False, opset_version=17)
    counts = Counter(node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node)
    del counts["Constant"]
    print(type(module).__name__, dict(counts))
