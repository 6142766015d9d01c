"""A depth of MTP equals transformers' MtpLayer around the same weights, in either order of its projection's input."""

import pytest
import torch
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from bench.llama import to_llama
from mini.model import Config, Transformer
from mini.mtp import MTP


@pytest.mark.parametrize("hidden_first", [True, False])
def test_depth(hidden_first):
    torch.manual_seed(0)
    config = Config(vocab_size=60, dim=48, n_layers=1, n_heads=4, inter_dim=80, max_seq_len=40)
    mtp = MTP(Transformer(config)).eval()
    for p in mtp.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    depth, twin = mtp.layers[0], Transformer(config).eval()
    twin.layers[0].load_state_dict(depth.block.state_dict())
    llama = to_llama(twin).model
    llama.config.mtp_hidden_states_first = (
        hidden_first  # the report's order; transformers' default is the other
    )
    theirs = MtpLayer(llama.config, LlamaDecoderLayer, LlamaRMSNorm, layer_idx=0).eval()
    theirs.mtp_block = llama.layers[0]
    h_part, e_part = depth.eh_proj.weight.chunk(2, dim=1)
    with torch.no_grad():
        theirs.eh_proj.weight.copy_(torch.cat((h_part, e_part) if hidden_first else (e_part, h_part), dim=1))
        theirs.hnorm.weight.copy_(depth.hnorm.weight)
        theirs.enorm.weight.copy_(depth.enorm.weight)
        theirs.post_norm.weight.copy_(depth.norm.weight)
        h, embedded = torch.randn(2, 3, 20, 48)
        places = torch.arange(20)[None]
        table = llama.rotary_emb(h, places)
        expected = theirs(embedded, h, table, attention_mask=None, position_ids=places, past_key_values=None)
        ours = depth(h, embedded, mtp.model.cos[:20], mtp.model.sin[:20])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
