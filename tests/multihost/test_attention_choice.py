"""All processes of a job attend in the way that rank 0 has measured or known, whatever each of them finds."""

import re
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import sys
from pathlib import Path
import jax.numpy as jnp
import spmd_infer as si

with si.initialize(quiet=True) as job:
    import jax
    from spmd_infer.functional import model_function
    from spmd_infer.generation.attention_choice import AttentionChoice
    from spmd_infer.generation.kept_answers import Answer, KeptAnswers
    from spmd_infer.models.cache_formats import CacheFormat
    from spmd_infer.models.llama import Config
    from spmd_infer.models.registry import find_family

    family, _ = find_family("LlamaForCausalLM", {})
    config = Config(64, 32, 32, 1, 4, 2, 8, 4096)
    function = model_function(family.abstract(config))
    params = {path: jnp.zeros(p.shape) for path, p in function.params.items()}
    engine = si.Engine(function.with_params(params), mesh="data=2", inputs=family.input_spec(config))
    file = Path(sys.argv[1]) / str(job.rank) / "attention.json"
    choice = AttentionChoice(engine, config, CacheFormat.of("int8", "cpu", "float32"), file)
    print("measured", choice.of_pages(1, 256, 4))
    print("asked again", choice.of_pages(1, 256, 4))
    (key,) = KeptAnswers(file).all()
    for rank, way in enumerate(("gathered", "in_place")):
        if job.rank == rank:
            KeptAnswers(file).keep(key.replace("256", "512"), Answer(way, {}))
    print("known", choice.of_pages(1, 512, 4))
"""


def test_rank_0_decides(tmp_path: Path) -> None:
    with Ranks(PROGRAM, 2, tmp_path, str(tmp_path)) as ranks:
        assert set(ranks.wait(180).values()) == {0}, ranks.err(0) + ranks.err(1)
        said = [re.findall(r"(?:measured|asked again|known) (\w+)", ranks.out(rank)) for rank in range(2)]
    assert said[0] == said[1]
    measured, again, known = said[0]
    assert measured == again in ("in_place", "gathered")
    assert known == "gathered"  # rank 1's own file says in_place
