"""Claims about the toy world, stage 0 and the miniature benchmarks; a test's name is the claim."""

import functools
import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))  # pytest runs from anywhere

import train
import vino
from toy import benchmark, figures, pretrain, world
from vino import Config, InputError, Vino

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def toy():
    config = Config.from_file(HERE / "tiny_config.json")
    return world.ToyWorld(train.make_stage("3", config, {}), config, 0)


def scene_of(*objects, ground="gray"):
    return world.Scene(ground, [world.Object(*words, (0, 0)) for words in objects])


# ----------------------------------------------------------------------------------------------------------
# The toy world
# ----------------------------------------------------------------------------------------------------------


def test_samples_depend_on_their_number_only_and_a_steps_samples_have_one_layout(toy):
    again = world.ToyWorld(toy.stage, toy.config, 0)
    for name, task in world.TASKS.items():
        samples = [toy.draw(name, 40, index) for index in range(40, 56)]
        assert samples == [again.draw(name, 40, index) for index in range(40, 56)]
        assert len({s.prompt + str(s.target) for s in samples}) > 8, name
        batch = toy.collate(name, samples, "cpu")
        assert batch.target.shape == (16, 3, 9 if task.clip else 1, 64, 64)
        videos = [r.is_video for r in batch.references]
        assert videos == sorted(videos) and sum(videos) == task.video
        assert len(videos) - sum(videos) in task.images


def test_objects_keep_apart_inside_the_frame_in_their_flat_colours(toy):
    allowed = torch.tensor([*world.COLORS.values(), *world.BACKGROUNDS.values()])
    for name, task in world.TASKS.items():
        samples = [toy.draw(name, 0, index) for index in range(24)]
        times = (0, 0.5, 1) if task.clip else (0,)
        for item, time in itertools.product(samples, times):
            for x, y, r in [world.trace(thing, time) for thing in item.target.objects]:
                assert min(x, y, 64 - x, 64 - y) >= r - 1e-6, (name, item)
        pixels = (toy.collate(name, samples, "cpu").target + 1) * 127.5
        pixels = pixels.permute(0, 2, 3, 4, 1).reshape(-1, 3)
        flat = (torch.cdist(pixels, allowed.float()).min(1).values < 0.6).float().mean()
        assert flat > 0.9, name  # what is left are edges


def test_short_captions_count_and_relate_truly():
    seen = Counter()
    for number in range(300):
        sample = world.SampleMaker(f"captions {number}").caption(0, False)
        objects, short = sample.target.objects, sample.short_prompt
        seen[sample.kind] += 1
        if sample.kind == "counting":
            assert short.startswith({2: "two ", 3: "three "}[len(objects)])
            assert len({item[:3] for item in objects}) == 1
        if sample.kind == "position":
            (x, y, _), (u, v, _) = (world.trace(item, 0) for item in objects)
            assert (x < u and "left of" in short) or (x > u and "right of" in short) or (
                y < v and "above" in short) or (y > v and "below" in short)  # fmt: skip
    assert all(seen[kind] > 40 for kind in ("", "counting", "position"))


def test_what_is_seen_is_described_in_reading_order_and_what_is_expanded_in_the_texts():
    for number in range(40):
        maker = world.SampleMaker(f"orders {number}")
        expanded, seen = maker.rewrite(0, True), maker.look(0, True)
        reading = sorted(seen.target.objects, key=lambda item: [*world.CELLS].index(item.cell))
        for told, objects in ((expanded, expanded.target.objects), (seen, reading)):
            words = re.findall(r"A (\w+) (\w+) (\w+) starts at", world.describe(told, clip=True))
            assert words == [(item.size, item.color, item.shape) for item in objects]
            names = [told.prompt.find(f"{item.color} {item.shape}") for item in objects]
            assert names == sorted(names)  # in the text too, where it names them


def test_every_word_of_the_toy_world_is_one_token_and_other_words_are_bytes():
    tokenizer = world.toy_tokenizer()
    for name, task in world.TASKS.items():
        sample = world.make_sample("other words", name, max(task.images))
        words = tokenizer.pre_tokenizer.pre_tokenize_str(sample.prompt)
        encoded = tokenizer.encode(sample.prompt)
        assert len(encoded.ids) == len(words) and tokenizer.decode(encoded.ids) == sample.prompt
    assert len(tokenizer.encode("corgi").ids) == 5
    assert tokenizer.to_str() == vino.read_metadata(train.TINY, None)[1].to_str()


# ----------------------------------------------------------------------------------------------------------
# Stage 0
# ----------------------------------------------------------------------------------------------------------

SMALL = {  # tiny_config.json, smaller
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "mrope_section": [3, 3, 2]},
    "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
               "deepstack_visual_indexes": [0, 1]},
    "mmdit": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
              "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 32, "rope_axes_dim": [4, 6, 6]},
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "sampling": {"frames": 5}, "num_queries": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The exports of stage 0's three parts, for a very small model and two steps each."""
    folder = tmp_path_factory.mktemp("stage0")
    tiny = json.loads((HERE / "tiny_config.json").read_text())
    for section, values in SMALL.items():
        tiny[section] = tiny[section] | values if isinstance(values, dict) else values
    (folder / "small.json").write_text(json.dumps(tiny))
    call = [f"--config={folder / 'small.json'}", f"--out={folder}/p", "--steps=2", "--batch=2"]
    assert pretrain.main([*call, "--validate-every=0"]) == 0
    return {part: folder / f"p-{part}" / "final.safetensors" for part in pretrain.PARTS}


def test_each_part_trains_its_own_module_and_the_text_encoder_is_thrown_away(parts):
    models = {part: Vino.load(path).state_dict() for part, path in parts.items()}
    assert not any("native" in name for name in models["mmdit"])

    def changed(before, after):
        names = {
            name for name, tensor in models[before].items() if not torch.equal(tensor, models[after][name])
        }
        return {name.split(".")[0] for name in names}, {name.split(".")[1] for name in names}

    assert changed("vae", "vlm") == ({"mm_encoder"}, {"mm_encoder"})  # not the connectors
    assert changed("vlm", "mmdit")[0] == {"transformer"}


@torch.no_grad()
def test_latents_are_as_wide_as_the_noise(parts, toy):
    model, latents = Vino.load(parts["vae"]), []
    for task in ("t2i", "t2v"):
        batch = toy.collate(task, [toy.draw(task, 0, index) for index in range(16)], "cpu")
        latents.append(model.vae.encode(batch.target).flatten())
    assert 0.7 < torch.cat(latents).std() < 1.4


@torch.no_grad()
def test_kept_encodings_give_the_loss_of_new_ones(parts, toy):
    model = Vino.load(parts["mmdit"])
    stage = replace(toy.stage, encode_once=8)
    keeping, objective = world.ToyWorld(stage, toy.config, toy.seed, model), train.Objective(model, 3.0)
    for task in ("t2v", "tiv2v"):
        samples = [keeping.draw(task, 0, index) for index in range(12)]
        assert {sample.number for sample in samples} == {*range(8)}
        again = [sample._replace(number=None) for sample in samples]
        batches = [keeping.collate(task, chosen, "cpu") for chosen in (samples, samples[::-1], again)]
        losses = [objective(replace(batch, key=("test",))) for batch in (batches[0], batches[2])]
        torch.testing.assert_close(*losses)
        assert batches[1].latents is not None and batches[2].latents is None


@torch.no_grad()
def test_the_answers_loss_is_next_token_cross_entropy_whatever_the_padding(parts, toy):
    model = Vino.load(parts["vlm"])
    objective, vlm = pretrain.Captioning(model, 1.0), model.mm_encoder
    samples = [toy.draw("look", 0, index) for index in range(3)]
    together = objective(toy.collate("look", samples, "cpu"))
    alone = [objective(toy.collate("look", [sample], "cpu")) for sample in samples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=0)
    batch = toy.collate("look", samples[:1], "cpu")
    references = [model.encode(reference) for reference in batch.references]
    prompts = vino.build_prompts(vlm.tokenizer, batch.prompts, references, vlm.merge)
    answer = [*vlm.tokenizer.encode(batch.answers[0]).ids, vlm.tokenizer.token_to_id("<|im_end|>")]
    behind = prompts.positions.max() + 1 + torch.arange(len(answer)).expand(3, 1, -1)
    ids = torch.cat([prompts.ids, torch.tensor([answer])], 1)
    whole = vino.Prompts(ids, torch.cat([prompts.positions, behind], 2), None, [], [])
    states = vlm.prefill(whole, references, DynamicCache())[0][0, prompts.ids.shape[1] - 1 : -1]
    expected = F.cross_entropy(vlm.mm_encoder.lm_head(states), torch.tensor(answer))
    torch.testing.assert_close(together[0], expected, rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------------------
# The benchmarks
# ----------------------------------------------------------------------------------------------------------


def blurred(pixels):
    """A little blur, and noise of 29 dB, on [B, 3, T, H, W]."""
    spread = sum(pixels.roll(steps, dims) for steps in (1, -1) for dims in (3, 4))
    return 0.7 * pixels + 0.075 * spread + 0.07 * torch.randn(pixels.shape, generator=torch.manual_seed(0))


def test_the_benchmarks_see_each_scene_of_the_toy_world_through_blur_and_noise(toy):
    right = []
    for task, count, times in (("t2i", 150, [0]), ("t2v", 20, [0, 0.5, 1])):
        samples = [toy.draw(task, 0, index) for index in range(count)]
        pixels = blurred(toy.collate(task, samples, "cpu").target)
        for sample, clip in zip(samples, pixels):
            frames = clip[:, [round(time * (clip.shape[1] - 1)) for time in times]]
            seen = benchmark.detect(frames.transpose(0, 1))
            right += [benchmark.fits(a, sample.target, time) for a, time in zip(seen, times, strict=True)]
    assert len(right) == 210 and sum(right) >= 208


ONE = ("cross", "red", "small", "left", "growing")
TWO = ("circle", "cyan", "large", "right", "standing still")
TOLD = scene_of(ONE, TWO)


def test_a_frame_fits_a_scene_only_if_every_object_and_the_ground_do():
    others = [scene_of(ONE), scene_of(ONE, TWO, ground="white")]
    others.append(scene_of(ONE, TWO, ("square", "blue", "small", "top", "standing still")))
    changes = {0: "square", 1: "green", 2: "small", 3: "top right"}
    others += [scene_of(ONE, (*TWO[:field], word, *TWO[field + 1 :])) for field, word in changes.items()]
    seen = benchmark.detect(world.render([TOLD, *others], 1, 64, "cpu")[:, :, 0])
    assert [benchmark.fits(frame, TOLD) for frame in seen] == [True] + [False] * len(others)


def test_clips_are_scored_by_what_moves_how_and_who_is_where():
    swapped, still = scene_of((*TWO[:2], *ONE[2:]), (*ONE[:2], *TWO[2:])), scene_of((*ONE[:4], TWO[4]), TWO)
    sample = world.Sample("", "", "", [], TOLD, TOLD)
    clips = [*world.render([TOLD, swapped, still, scene_of(ONE)], 9, 64, "cpu")]
    casts = [benchmark.score_cast("2", sample, clip, clips[0], None) for clip in clips]
    names = ("identities kept", "motion class", "identities right", "identities swapped")
    assert [tuple(cast["2", name] for name in names) for cast in casts] == [
        (True, True, True, False), (True, False, False, True),
        (True, False, True, False), (False, False, False, False),
    ]  # fmt: skip
    assert [cast["2", "first frame, dB"] > 59 for cast in casts] == [True, False, True, False]
    edits = [benchmark.score_edit("x", sample, clip, clips[0], clips[3]) for clip in clips]
    assert [values["x", "success"] for values in edits] == [True, False, False, False]
    flicker = torch.tensor([0.08, -0.08] * 4 + [0.08])[:, None, None]
    clips += [clips[0][:, [0, 1, 2, 3, 7, 4, 5, 6, 8]], clips[0] + flicker]
    rows = [benchmark.score_clip("clips", sample, clip, None, None) for clip in clips]
    names = ("subject consistency", "motion smoothness", "dynamic degree", "motion class")
    assert [tuple(row[name, "right"] for name in names) for row in rows] == [
        (True, True, True, True), (True, True, True, False), (True, True, False, False),
        (True, True, True, False), (True, False, True, True), (True, True, True, True),
    ]  # fmt: skip
    assert [round(row["temporal flickering", "gray levels"]) for row in rows] == [0] * 5 + [20]
    white = world.render([TOLD._replace(background="white")], 9, 64, "cpu")[0]
    pieces = [white, torch.cat([clips[0][:, :4], white[:, 4:]], 1)]  # which one it is, the row does not ask
    rows = [benchmark.score_clip("clips", sample, clip, None, None) for clip in pieces]
    assert [row["background consistency", "right"] for row in rows] == [True, False]


def test_answers_are_scored_word_by_word():
    sample = world.Sample("", "", "", [], TOLD, scene_of(ONE))
    for text, wrong in {
        "A video on a gray background. A small red cross starts at the left and is growing.": "",
        "A small red cross grows at the left": "background",
        "On a gray background, a large red cross moves left from the top left.": "size motion cell",
        "A small red or blue circle is growing left, on a white background": "colour shape background",
    }.items():
        values = benchmark.score_answer("clips", sample, text, None, None)
        assert len(values) == 6
        assert {name for (name, _), right in values.items() if not right} == {*wrong.split()}, text
    clip, image = torch.zeros(3, 9, 64, 64), torch.zeros(3, 1, 64, 64)
    for target, answer, right in ((clip, True, True), (image, False, True), (clip, False, False)):
        score = benchmark.score_told("x", sample, world.describe(sample, answer), target, None)
        assert score == {("x", "right"): right}


def test_perfect_outputs_are_all_right_in_every_benchmark(toy):
    ideal = {"answer": lambda batch: batch.answers}
    ideal |= dict.fromkeys(["generate", "autoencode"], lambda batch: batch.target)
    results, _ = benchmark.measure(benchmark.SUITES, 4, toy, "cpu", ideal)
    assert [len(values) for values in results.values()] == [18, 6, 13, 12, 18, 6, 9, 4]
    for (row, column), values in itertools.chain(*[suite.items() for suite in results.values()]):
        best = {"identities swapped": False, "gray levels": 0}
        best |= dict.fromkeys(["rest, dB", "first frame, dB", "PSNR, dB"], 60)
        best = best.get(column, True)
        assert len(values) >= 2 and set(values) == {best}, (row, column)


def test_intervals_are_wilsons_for_rates_and_normal_for_numbers():
    assert benchmark.interval([True] * 9 + [False]) == "90.0% (59.6% to 98.2%)"  # by hand
    assert [benchmark.interval(dB) for dB in ([30.0], [30.0, 32.0])] == ["30.00", "31.00 ± 1.39"]


def test_the_shipped_weights_are_small_and_their_vae_and_vlm_know_the_toy_world(tmp_path, capsys):
    assert train.TINY.stat().st_size <= 24 * 2**20
    call = ["autoencoder", "understanding", "--samples", "10", "--out", str(tmp_path)]
    assert benchmark.main(call) == 0
    rows = dict(re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+)", capsys.readouterr().out, re.MULTILINE))
    assert float(rows["images"]) > 35 and float(rows["clips"]) > 32 and float(rows["mean"]) > 95


def test_a_benchmark_writes_its_table_with_intervals_and_its_picture(tmp_path, capsys, monkeypatch):
    expanded = []
    monkeypatch.setattr(Vino, "rewrite", lambda self, prompts: expanded.extend(prompts) or prompts)
    call = ["geneval", "--samples", "2", "--steps", "1", "--out", str(tmp_path / "b")]
    assert benchmark.main(call) == 0
    text = (tmp_path / "b/benchmark.md").read_text()
    assert text in capsys.readouterr().out and len(expanded) == 12  # prompts of text alone
    assert re.search(r"\| overall \| 12 \| [\d.]+% \([\d.]+% to [\d.]+%\) \|", text)
    assert "| geneval | samples | right | long prompts | short prompts |" in text
    assert Image.open(tmp_path / "b/benchmark.png").height >= 12 * 96


@torch.no_grad()
def test_the_queries_share_of_attention_is_measured_without_changing_the_velocity():
    model = Vino.load(train.TINY)
    condition, latents, t = (
        model.mm_encoder(["a red circle"], []),
        torch.randn(1, 16, 1, 8, 8),
        torch.tensor([0.5]),
    )
    recorder = benchmark.AttentionShares(64, model.config.num_queries)
    watched = model.transformer(latents, t, condition, recorder)
    torch.testing.assert_close(watched, model.transformer(latents, t, condition))
    blocks = model.config.mmdit.num_layers + model.config.mmdit.num_single_layers
    assert len(recorder.text) == blocks
    assert all(0 < q < text < 1 for q, text in zip(recorder.of_queries, recorder.text))
    assert 0 < benchmark.queries_share(model, "a red circle", (1, 64, 64), steps=2) < 1


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def test_runs_are_compared_in_a_picture_and_a_table(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "task": "t2i", "loss": 1 / s, "grad_norm": 2.0} for s in range(1, 7)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = figures.compare({"one": tmp_path / "one", "other": tmp_path / "other"}, tmp_path / "both.png")
    assert "| one | all | 0.2056 | 2.000 | 0.0000 |" in text and "| other | t2i | 0.2056 |" in text
    assert Image.open(tmp_path / "both.png").size == (900, 800)


def test_a_gallery_shows_inputs_target_and_every_models_output(tmp_path, monkeypatch):
    blank = functools.partialmethod(lambda self, prompts, *_, size, **__: torch.zeros(1, 3, *size))
    monkeypatch.setattr(Vino, "generate", blank)
    columns = {"one": (train.TINY, {}), "other": (train.TINY, {"cfg_image": 2.0})}
    figures.gallery(columns, tmp_path / "gallery.png", tasks=("ti2i", "tv2v"))
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.height > 2 * 96 and picture.width > (3 + 3 + 3 + 3) * 64
    figures.gallery(columns, tmp_path / "gallery.gif", tasks=("tv2v",))
    with Image.open(tmp_path / "gallery.gif") as picture:
        assert picture.n_frames == 9


def test_an_unknown_suite_is_one_line():
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["imgedit"])
    with pytest.raises(InputError):
        Vino.load("missing.safetensors")


@pytest.mark.parametrize(
    "call, problem",
    [
        ("gallery a=b.safetensors --tasks t2q", "unknown task 't2q'"),
        ("gallery", "gallery needs NAME=PATH"),
        ("curves runs/stage3", "curves needs NAME=PATH"),
        ("gallery a=b.safetensors --out note.txt", "note.txt should end in .png or .gif"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_one_line(call, problem, capsys):
    assert figures.main(call.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
