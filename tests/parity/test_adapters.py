"""Adapters as PEFT makes, names and saves them change the model as they do in PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmd_infer.axes import BATCH, SEQ, VOCAB
from spmd_infer.checkpoints.lora import LoraAdapter
from spmd_infer.engine import Engine
from spmd_infer.generation.adapters import Adapters
from spmd_infer.generation.batches import Layout
from tests.references.llama_variants import token_ids, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# PEFT asks transformers for a name that is on its way out.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "every projection": {"r": 8, "lora_alpha": 16, "target_modules": EVERY},
    "two, rsLoRA": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "ranks and alphas by name": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3, "self_attn.o_proj": 5},
    },
}


def saved(base: Path, folder: Path, kind: str) -> np.ndarray:
    """Save an adapter with random numbers; returns the changed model's logits."""
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(token_ids(len(KINDS), 24), dtype=torch.long)).logits.numpy()
    return logits


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
def test_rows_of_one_batch_equal_peft(mesh: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "gqa")
    engine = Engine.load(tmp_path / "base", mesh=mesh, buckets=[8])
    adapters = Adapters(engine, len(KINDS), 8)
    wanted = []
    for row, kind in enumerate(KINDS):
        wanted.append(saved(tmp_path / "base", tmp_path / kind, kind)[row])
        adapters.load(kind, LoraAdapter.open(tmp_path / kind))

    def logits(model: Any, rows: Any, ids: Any) -> Any:
        rows.onto(model)
        return model(ids)

    names = list(KINDS) * 3
    rows = adapters.rows(Layout.of([0] * 8, 1, lambda count: count), [adapters.find(name) for name in names[:8]])
    ids = engine.place(np.tile(token_ids(len(KINDS), 24), (3, 1))[:8], (BATCH, SEQ))
    found = np.asarray(engine.jit("adapted", logits, out_axes=(BATCH, SEQ, VOCAB))(rows, ids))
    for row in range(8):
        expected = wanted[row % len(KINDS)]
        # float32 sums in another order, relative to the largest logit.
        assert np.abs(found[row] - expected).max() <= 1e-4 * np.abs(expected).max(), names[row]
