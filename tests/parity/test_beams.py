"""Beam search gives what transformers' ``generate(num_beams=...)`` gives, on the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmd_infer.generation.beams import BeamSearch
from tests.references.llama_variants import token_ids, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
ENDS = [3, 77]  # of 128 tokens, so that some sequences end early
PAD, MOST = 1, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(Path(folder), "gqa")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_same_sequences(model: Any, num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    ended = 0
    for prompt in token_ids(3, 8).tolist():
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=MOST,
                do_sample=False,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                eos_token_id=ENDS,
                pad_token_id=PAD,
                output_scores=True,
                return_dict_in_generate=True,
            )
        ours = BeamSearch(
            num_beams,
            MOST,
            ENDS,
            length_penalty=length_penalty,
            early_stopping=early_stopping,  # type: ignore[arg-type]
        )
        while not ours.is_done:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens] for tokens in ours.beams])).logits[:, -1]
                top, ids = torch.log_softmax(logits, -1).topk(ours.num_candidates)
            ours.step(ids.numpy(), top.numpy())
        found = ours.best(num_beams)
        wanted = [row[len(prompt) :] for row in theirs.sequences.tolist()]
        for each, tokens in zip(found, wanted, strict=True):
            assert list(each.tokens) == tokens[: len(each.tokens)]
            assert set(tokens[len(each.tokens) :]) <= {PAD}
            ended += not each.length_limited
        # Sums of at most 12 float32 log-probabilities.
        np.testing.assert_allclose([each.score for each in found], theirs.sequences_scores.numpy(), rtol=1e-4)
    assert ended > 0
