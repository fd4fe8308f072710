"""`plan` tells what becomes of a tile: per encoder, in the fusion and in all."""

import pytest
from rich.console import Console

from eagle_train.tools.plan import make_plan, show_geometry
from eagle_train.train.config import load_config


def plan(*overrides, tmp_path):
    return make_plan(load_config(["+experiment=toy", f"data_root={tmp_path}", *overrides]), ranks=1)


def test_each_encoder_is_told_with_its_resampling(tmp_path):
    told = plan("mixture.grid=null", "mixture.encoders.convnext.image_size=96", tmp_path=tmp_path)
    assert told["grid_taken_from"] == "convnext" and told["tokens_per_tile"] == 36 and told["channels"] == 192
    vit, convnext = told["encoders"]["vit"], told["encoders"]["convnext"]
    assert (vit["input_size"], vit["grid"], vit["fused_grid"], vit["resampling"]) == (48, 4, 6, "up")
    assert (convnext["input_size"], convnext["grid"], convnext["resampling"]) == (96, 6, "none")
    parts = [vit["flops"], convnext["flops"], *told["fusion_flops_per_tile"].values()]
    assert told["vision_flops_per_tile"] == sum(parts) and min(vit["flops"], convnext["flops"]) > 1e6


@pytest.mark.slow
def test_a_grid_of_the_config_is_taken_from_no_encoder(tmp_path):
    assert plan("mixture.grid=3", tmp_path=tmp_path)["grid_taken_from"] is None
    told = plan("mixture=toy_deformable_attention", tmp_path=tmp_path)
    assert told["grid_taken_from"] is None and told["mixture"] == "DeformableAttention"
    assert told["fusion_flops_per_tile"]["fusion"] > 0


def test_the_table_names_the_encoder_that_gave_the_grid(tmp_path, capsys):
    show_geometry(plan("mixture.grid=null", tmp_path=tmp_path), Console(width=120))
    shown = capsys.readouterr().out
    assert "from a tile of 64 px to 16 tokens" in shown and "grid: that of convnext" in shown
    assert "48 px" in shown and "4x4x128" in shown and "16 x 192" in shown


@pytest.mark.slow
def test_ranks_that_share_rows_need_less_memory_for_them(tmp_path):
    def planned(*overrides, activations=False):
        config = load_config(["+experiment=toy", f"data_root={tmp_path}", "attention=auto", *overrides])
        return make_plan(config, ranks=4, activations=activations)

    def held(*overrides):
        return planned(*overrides, activations=True)["stages"][-1]["memory_bytes_per_rank"]["activations of a full row"]

    four = "engine.sequence_parallel=4"
    assert 0.2 < held(four) / held() < 0.5
    wide = ("llm.intermediate_size=8000", four)
    assert held(*wide, "engine.mlp_tile=16") < 0.6 * held(*wide)
    plans = [planned(f"engine.sequence_parallel={n}", "schedule.sft.rows_per_step=8") for n in (1, 2, 4)]
    assert [plan["ranks_per_row"] for plan in plans] == [1, 2, 4]
    assert [plan["stages"][-1]["micro_batches"] for plan in plans] == [2, 4, 8]
    assert "activations of a full row" not in plans[0]["stages"][-1]["memory_bytes_per_rank"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (["engine.sequence_parallel=4"], 6, "6 ranks do not make groups of engine.sequence_parallel=4"),
        (["engine.sequence_parallel=8"], 8, "4 heads cannot be shared by 8 ranks"),
    ],
)
def test_ranks_that_cannot_share_rows_are_refused(tmp_path, overrides, ranks, said):
    config = load_config(["+experiment=toy", f"data_root={tmp_path}", *overrides])
    with pytest.raises(ValueError, match=said):
        make_plan(config, ranks)
