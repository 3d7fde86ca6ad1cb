"""transformers 5 leaves TrOCR's sinusoidal position table without data after from_pretrained."""

import tempfile

import torch
import transformers
from transformers import TrOCRConfig, TrOCRForCausalLM

config = TrOCRConfig(
    vocab_size=40,
    d_model=16,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=16,
    use_learned_position_embeddings=False,
)
print("transformers", transformers.__version__)
model = TrOCRForCausalLM(config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = TrOCRForCausalLM.from_pretrained(folder)
for name, decoder in (("built", model), ("loaded", loaded)):
    print(f"{name}: the table is on", decoder.model.decoder.embed_positions.weights.device)
    try:
        print("logits", list(decoder(input_ids=torch.tensor([[2]])).logits.shape))
        decoder.to(torch.float16)
    except (NotImplementedError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
