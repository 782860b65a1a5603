"""BERT against transformers, on small random models of every variant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmd_infer.engine import Engine
from spmd_infer.planning.workload import Workload

pytestmark = pytest.mark.parity

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    # Larger than BERT's, so that attention and activations matter beside the residual.
    "initializer_range": 0.3,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"hidden_act": "gelu_new"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "gelu_fast"},
    {"hidden_act": "relu"},
    {"hidden_act": "silu"},
    {"layer_norm_eps": 1e-3},
    {"type_vocab_size": 5},
    {"num_attention_heads": 12, "intermediate_size": 33},
    {"num_attention_heads": 1, "num_hidden_layers": 4},
]


@pytest.mark.parametrize("masked_lm", [False, True])
@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_hidden_states(change: dict[str, Any], masked_lm: bool, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**BASE | change)
    reference = (transformers.BertForMaskedLM if masked_lm else transformers.BertModel)(config).eval()
    reference.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (5, 17))
    mask = (np.arange(17) < rng.integers(1, 18, (5, 1))).astype(np.int64)
    types = rng.integers(0, config.type_vocab_size, (5, 17))
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        encoder = reference.bert if masked_lm else reference
        expected = encoder(**{name: torch.tensor(values) for name, values in batch.items()}).last_hidden_state.numpy()
    engine = Engine.load(tmp_path, mesh="data=1", workload=Workload(sizes={"seq": 17}))
    found = engine.infer(batch)["last_hidden_state"]
    difference = np.abs(found - expected)[mask == 1]
    # float32 sums in another order; hidden states are around 1.
    assert difference.max() <= 1e-4
