"""Claims about the toy world, stage 0 and the small benchmarks; each test's name is a claim."""

import collections
import functools
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))  # pytest runs from anywhere

import train
import vino
from toy import benchmark, figures, language, pretrain, world
from vino import Vino

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def toy():
    config = vino.read_config(HERE / "tiny_config.json", "random")
    return world.ToyWorld(train.make_stage("3", config, {}), config, 0)


def words_of(text):
    return re.findall("[a-z]+", text.lower())


def scene_of(*objects, ground="gray"):
    return world.Scene(ground, [*objects])


def clips_of(*scenes):
    return [*world.render(scenes, 9, 64, "cpu")]


def sample_of(target, told=None, video=None, relation=""):
    return world.Sample("", "", "", [], video, target, told or target, relation)


RED = world.Object("circle", "red", "small", "left", "moving right")
BLUE = world.Object("square", "blue", "small", "right", "growing")
GREEN = world.Object("cross", "green", "small", "left", "growing")
CYAN = world.Object("circle", "cyan", "large", "right")
TWO = scene_of(GREEN, CYAN)


# --- The toy world ------------------------------------------------------------------------------------------


def test_samples_depend_only_on_their_number_and_all_samples_of_a_step_have_one_layout(toy):
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


@functools.cache
def drawn(phrasing):
    """Pairs (task, Sample): 500 of each layout of each task."""
    layouts = [(name, images) for name, task in world.TASKS.items() for images in task.images]
    return [
        (name, world.make_sample(f"tests {number}", name, images, phrasing))
        for name, images in layouts
        for number in range(500)
    ]


def test_objects_keep_clear_of_each_other_and_of_the_frames_edge_in_every_frame():
    for name, sample in [*drawn("known"), *drawn("unknown")]:
        for scene in filter(None, [*sample.images, sample.video, sample.target]):
            moves = scene is sample.video or scene is sample.target and world.TASKS[name].clip
            for frame in range(9 if moves else 1):
                places = [world.trace(item, frame / 8) for item in scene.objects]
                for x, y, r in places:
                    assert min(x, y, 64 - x, 64 - y) >= r + 1.5 - 1e-6, (name, sample)
                for (x, y, r), (u, v, q) in itertools.combinations(places, 2):
                    # Bounding boxes are apart, or circles large enough to hold a square's corners.
                    gap = max(abs(x - u), abs(y - v), math.dist((x, y), (u, v)) / 1.28)
                    assert gap >= r + q, (name, sample)


def test_scenes_are_drawn_in_their_flat_colours():
    allowed = torch.tensor([*world.COLORS.values(), *world.BACKGROUNDS.values()]).float()
    pixels = world.render([sample.target for _, sample in drawn("known")[::100]], 3, 64, "cpu")
    pixels = (pixels.transpose(0, 1).flatten(1).T + 1) * 127.5  # [N, 3]
    flat = torch.cdist(pixels, allowed).min(1).values < 0.6
    assert flat.float().mean() > 0.9  # what is left are edges


def test_motions_are_large_and_begin_wherever_there_is_room():
    starts = collections.defaultdict(set)
    for name, sample in drawn("known"):
        if name == "motion":
            [item], [other] = sample.target.objects, sample.video.objects
            assert item.motion == other.motion != "standing still"
            starts[item.motion].add((item.cell, other.cell))
        for item in sample.target.objects if world.TASKS[name].clip else []:
            (x, y, r), (u, v, q) = world.trace(item, 0), world.trace(item, 1)
            way = math.dist((x, y), (u, v))
            assert item.motion == "standing still" or way >= 10 or abs(r - q) >= 4
    edges = {"moving left": "left", "moving right": "right", "moving up": "top", "moving down": "bottom"}
    for motion, pairs in starts.items():
        room = {cell for cell in world.CELLS if edges.get(motion, "no edge") not in cell}
        assert {cell for cell, _ in pairs} == {cell for _, cell in pairs} == room, motion
        assert any(one != other for one, other in pairs)
    assert len(starts) == 6


# --- The language -------------------------------------------------------------------------------------------

SYNONYMS = {
    "disc disk dot ball discs balls circles": "circle", "box block cube boxes squares": "square",
    "rhombus diamonds": "diamond", "plus pluses crosses": "cross", "triangles": "triangle", "grey": "gray",
    "crimson": "red", "emerald": "green", "navy": "blue", "golden gold": "yellow", "violet lilac": "purple",
    "turquoise aqua teal": "cyan", "backdrop bg canvas": "background",
    "little tiny smaller mini teeny wee": "small",
    "big huge bigger larger giant massive enormous": "large", "upper": "top", "lower": "bottom",
    "centre middle centered centred": "center",
}  # fmt: skip
MEANING = {word: name for words, name in SYNONYMS.items() for word in words.split()}
WORDS = language.toy_tokenizer().get_vocab()
GO = "(mov(e|ing)|go|slid|head|drift|glid|travel|float|fl[iy]|run|makes its way)\\w*"
GO += "( off)?( from \\w+)?( to| towards)?( the)?"
WAYS = {
    "left": "left(wards)?",
    "right": "right(wards)?",
    "up": "(top|up(wards?)?)",
    "down": "(bottom|down(wards?)?)",
}
PATTERNS = [  # kind of fact, what to look for, in this order, and its name if that is another
    ("motion", "(stand|stay|remain|sit|is)\\w* (still|in place|put)", "standing still"),
    ("motion", "(stay|remain)\\w* where (it|they)( is| are)?", "standing still"),
    ("motion", "rests?|at rest|static|stationary|(not|t) mov\\w+|without motion", "standing still"),
    ("motion", "(doing|does|do) nothing|(does not|doesn t) do anything", "standing still"),
    ("motion", "(grow|expand|inflat|swell)\\w*|increas\\w* (in )?size|scal\\w* up", "growing"),
    ("motion", "((?<!i )get|becom)\\w* large( and large)?", "growing"),  # not "can I get large …"
    ("motion", "(shrink|contract)\\w*|decreas\\w* (in )?size|scal\\w* down", "shrinking"),
    ("motion", "(get|becom)\\w* small( and small)?", "shrinking"),
    *[("motion", f"{GO} {way}", f"moving {name}") for name, way in WAYS.items()],
    ("motion", "(ris|climb|ascend)\\w+", "moving up"), ("motion", "(fall|drop|sink)\\w+", "moving down"),
    *[("background", rf"((over|in front of|on) (a )?(background )?(that is )?)?{name}", name)
      for name in world.BACKGROUNDS],
    ("cell", "(top|bottom) (left|right)|center", ""),
    ("relation", "left (side )?of", "left of"), ("relation", "right (side )?of", "right of"),
    ("relation", "above|over", "above"), ("relation", "below|under", "below"),
    ("cell", "top|bottom|left|right", ""),
    ("size", "shrink|reduce|scale down", "small"), ("size", "enlarge|increase|scale up|grow", "large"),
    ("shape", "|".join(world.SHAPES), ""), ("color", "|".join(world.COLORS), ""),
    ("size", "|".join(world.SIZES), ""),
]  # fmt: skip


def read(text, clip):
    """What a text says, read without the grammar: {kind of fact: set of words}."""
    words = [word for word in words_of(text) if word in WORDS]
    text, found = " ".join(MEANING.get(word, word) for word in words), collections.defaultdict(set)
    for kind, pattern, name in PATTERNS:
        if clip or kind != "motion":
            pattern = re.compile(rf"\b({pattern})\b")
            found[kind] |= {name or match[0] for match in pattern.finditer(text)}
            text = pattern.sub("|", text)
    return found


def facts_of(scene, relation=""):
    """What a Scene says, in the same form."""
    facts = {"background": {scene.background} - {None}, "relation": {relation} - {""}}
    for kind in ("shape", "color", "size", "cell", "motion"):
        facts[kind] = {getattr(item, kind) for item in scene.objects} - {None}
    return facts


@pytest.mark.parametrize("phrasing", ["known", "unknown"])
def test_a_request_states_what_is_told_and_nothing_else_and_all_of_it_is_true(phrasing):
    for name, sample in drawn(phrasing):
        if name not in ("t2i", "t2v"):
            continue
        clip = name == "t2v"
        found, told = read(sample.short_prompt, clip), facts_of(sample.told, sample.relation)
        if found["relation"] == {world.OPPOSITE.get(sample.relation)}:  # "left of the square is a circle"
            found["relation"] = {sample.relation}
        assert all(found[kind] == told[kind] for kind in told if kind != "motion" or clip), sample
        for item, whole in zip(sample.told.objects, sample.target.objects, strict=True):
            assert all(fact in (None, own) for fact, own in zip(item[:5], whole)), sample
        assert sample.told.background in (None, sample.target.background)
        if sample.relation:
            (x, y, _), (u, v, _) = (world.trace(item, 0) for item in sample.target.objects)
            assert {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[sample.relation]
        if sample.kind == "counting":
            number = len(sample.target.objects)
            words = {2: r"\b(two|2|pair|couple)\b|image|video", 3: r"\b(three|3)\b|image"}[number]
            assert re.search(words, sample.short_prompt.lower())
            assert len({item[:3] for item in sample.target.objects}) == 1


@pytest.mark.parametrize("phrasing", ["known", "unknown"])
def test_an_edit_names_what_changes_and_nothing_that_is_neither_in_source_nor_target(phrasing):
    for name, sample in drawn(phrasing):
        if name not in ("ti2i", "tv2v"):
            continue
        source, target = sample.video or sample.images[-1], sample.target
        found, told = read(sample.short_prompt, name == "tv2v"), facts_of(sample.told)
        before, after = facts_of(source), facts_of(target)
        for kind in ("shape", "color", "size", "cell", "background"):
            assert found[kind] <= before[kind] | after[kind], sample
            assert told[kind] - before[kind] <= found[kind], sample
        changed = [item for item in source.objects if item not in target.objects]
        assert len(changed) <= (2 if re.search("both|all|everything", sample.short_prompt) else 1)


def test_captions_state_every_fact_in_the_order_of_the_text_or_with_references_in_reading_order():
    for name, sample in drawn("known"):
        clip, seen = world.TASKS[name].clip, bool(sample.images or sample.video)
        caption = world.describe(sample.target, clip, ordered=not seen)
        is_video, scene = benchmark.read_caption(caption)
        told = sample.target.objects
        if seen:
            told = sorted(told, key=lambda item: [*world.CELLS].index(item.cell))
        assert is_video == clip and scene.background == sample.target.background
        fields = 5 if clip else 4  # no motion
        assert [item[:fields] for item in scene.objects] == [item[:fields] for item in told]
        assert sample.prompt in (caption, sample.short_prompt)
        if not seen and len(told) == 2 and told[0].shape != told[1].shape and told[0].color != told[1].color:
            words = [MEANING.get(word, word) for word in words_of(sample.short_prompt)]
            assert words.index(told[0].shape) < words.index(told[1].shape)


def collect_words(phrase, known, held):
    """Append the words of a phrase to `known`, and those of its held-out parts to `held`."""
    for part in phrase:
        if type(part) is language.Choice:
            for option in part.known:
                collect_words(option, known, held)
            for option in part.held:
                collect_words(option, held, held)
        elif type(part) is str:
            known += words_of(part)


def test_held_out_phrases_and_layouts_are_never_drawn_in_training_but_their_words_are(toy):
    texts, layouts = {}, {}
    for phrasing in ("known", "unknown"):
        samples = [sample for _, sample in drawn(phrasing)]
        texts[phrasing] = {tuple(words_of(sample.short_prompt)) for sample in samples}
        scenes = [
            scene
            for sample in samples
            for scene in filter(None, [*sample.images, sample.video, sample.target])
        ]
        pairs = [itertools.combinations([item.cell for item in scene.objects], 2) for scene in scenes]
        layouts[phrasing] = {frozenset(pair) for pair in itertools.chain(*pairs)}
    assert not texts["known"] & texts["unknown"]
    assert not layouts["known"] & world.HELD_OUT_LAYOUTS and world.HELD_OUT_LAYOUTS <= layouts["unknown"]
    known, held = [], []
    for rule in language.GRAMMAR.values():
        collect_words(rule, known, held)
    assert held and {*held} <= {*known}
    trained = [toy.draw("ti2i", 0, index) for index in range(50)]
    assert trained == [world.make_sample(f"0 ti2i {index}", "ti2i", 1, "known") for index in range(50)]


EXAMPLES = [  # what people typed; "!" marks what only a held-out phrase makes
    ("A small blue square on a white background.", "image", [BLUE]),
    ("!RED CIRCLE", "image", [RED]),
    ("!a picture of a red circle", "image", [RED]),
    ("!Two green crosses", "image", [GREEN, GREEN]),
    ("A red circle and a blue square on a white background.", "image", [RED, BLUE]),
    ("!the green cross is getting bigger", "clip", [GREEN]),
    ("!a red circle moves to the right", "clip", [RED]),
    ("!turn it blue", "recolor", [RED]),
    ("!remove the circle", "remove", [RED]),
    ("!Change the color of the red circle to blue.", "recolor", [RED]),
    ("!make both blue", "recolor", [RED, GREEN._replace(cell="bottom", motion="standing still")]),
]


@pytest.mark.parametrize("text, how, objects", EXAMPLES)
def test_the_grammar_can_make_what_people_type(text, how, objects):
    maker, scene = world.SampleMaker(7, "unknown"), scene_of(*objects, ground="white")
    for _ in range(1_000_000):
        maker.held_out = False
        if how in ("image", "clip"):
            said, _, _ = maker.phrase(scene, how == "clip", "counting")
        else:
            sample = maker.change(how, scene, [scene_of(BLUE)], False, False)
            said = sample.short_prompt if sample else ""
        if words_of(said) == words_of(text):
            assert maker.held_out == text.startswith("!")
            return
    raise AssertionError(text)


def test_a_word_known_or_not_is_one_token_whatever_its_case_and_the_punctuation_around_it():
    tokenizer = language.toy_tokenizer()
    assert tokenizer.get_vocab_size() < 512
    ids = tokenizer.encode("a red circle at the left").ids
    assert tokenizer.token_to_id(language.UNKNOWN) not in ids
    for text in ("A RED Circle at the left", '"a red circle", (at the left)!', "a red-circle;at\tthe left?"):
        assert tokenizer.encode(text).ids == ids
    strange = tokenizer.encode("a Corgi-shaped circle's corgi").tokens
    assert strange == ["a", language.UNKNOWN, language.UNKNOWN, "circle", "s", language.UNKNOWN]
    for name, sample in drawn("known"):
        caption = world.describe(sample.target, world.TASKS[name].clip)
        assert tokenizer.decode(tokenizer.encode(caption).ids) == caption
    video = SimpleNamespace(grid=(1, 2, 2), is_video=True)
    prompt = vino.build_prompts(tokenizer, ["Make it red"], [video], 2).ids[0].tolist()
    words = [tokenizer.id_to_token(token) for token in prompt]
    assert language.UNKNOWN not in words and " ".join(words).endswith(  # figure 4's
        "user \n video 1 : < 0 . 0 seconds > <|vision_start|> <|video_pad|> <|vision_end|> make it red "
        "<|im_end|> \n <|im_start|> assistant \n"
    )


# --- Stage 0 ------------------------------------------------------------------------------------------------

SMALL = {  # changes that make tiny_config.json smaller
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
    models["random"] = Vino.load("random", vino.read_config(parts["vae"].parents[1] / "small.json", "random"))
    pretrain.quieten(models["random"])
    models["random"] = models["random"].state_dict()

    def changed(before, after):
        return [name for name in models[after] if not torch.equal(models[before][name], models[after][name])]

    assert {name.split(".")[0] for name in changed("random", "vae")} == {"vae"}
    assert {name.split(".")[0] for name in changed("vlm", "mmdit")} == {"transformer"}
    assert {name.split(".")[1] for name in changed("vae", "vlm")} == {"mm_encoder"}  # not the connectors


@torch.no_grad()
def test_latents_have_about_the_standard_deviation_of_the_noise(parts, toy):
    model, latents = Vino.load(parts["vae"]), []
    for task in ("t2i", "t2v"):
        batch = toy.collate(task, [toy.draw(task, 0, index) for index in range(16)], "cpu")
        latents.append(model.vae.encode(batch.target).flatten())
    assert 0.7 < torch.cat(latents).std() < 1.4


@torch.no_grad()
def test_the_vision_towers_features_are_the_same_with_attention_batched_over_frames(parts, toy):
    encoder = Vino.load(parts["vlm"]).mm_encoder
    reference = toy.collate("watch", [toy.draw("watch", 0, index) for index in range(3)], "cpu").references[0]
    expected, names = encoder.encode_vision(reference), [*encoder.state_dict()]
    for block in encoder.mm_encoder.model.visual.blocks:
        block.attn = pretrain.BatchedFrameAttention(block.attn)
    features = encoder.encode_vision(reference)
    assert [*encoder.state_dict()] == names
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_kept_encodings_give_the_same_loss_as_new_ones(parts, toy):
    model = Vino.load(parts["mmdit"])
    stage = replace(toy.stage, encode_once=8)
    keeping, objective = world.ToyWorld(stage, toy.config, toy.seed, model), train.Objective(model, 3.0)
    for task in ("t2v", "tiv2v"):
        samples = [keeping.draw(task, 0, index) for index in range(12)]
        images = samples[0][0]
        again = [world.make_sample(f"{toy.seed} {task} 0 {number}", task, images) for _, number in samples]
        batches = [keeping.collate(task, chosen, "cpu") for chosen in (samples, samples[::-1], again)]
        losses = [objective(replace(batch, key=("test",))) for batch in batches]
        torch.testing.assert_close(losses[0], losses[2])
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


# --- The benchmarks -----------------------------------------------------------------------------------------


def blurred(pixels):
    """A little blur, and noise of 29 dB, on [B, 3, T, H, W]."""
    spread = sum(pixels.roll(steps, dims) for steps in (1, -1) for dims in (3, 4))
    return 0.7 * pixels + 0.075 * spread + 0.07 * torch.randn(pixels.shape, generator=torch.manual_seed(0))


def test_the_benchmarks_recognize_scenes_through_blur_and_noise(toy):
    right = []
    for task, count in (("t2i", 150), ("t2v", 20)):
        samples = [toy.draw(task, 0, index) for index in range(count)]
        for sample, clip in zip(samples, blurred(toy.collate(task, samples, "cpu").target)):
            seen = benchmark.detect(clip)
            right.append(benchmark.obeys(seen, sample_of(sample.target)))
    assert len(right) == 170 and sum(right) >= 168


def test_an_output_is_right_if_all_that_the_text_states_is_there_and_nothing_else():
    others = {"shape": "square", "color": "red", "size": "small", "cell": "top right", "motion": "moving up"}
    outputs = [scene_of(GREEN, CYAN._replace(**{field: word})) for field, word in others.items()]
    outputs += [TWO, scene_of(*TWO.objects, ground="white"), scene_of(GREEN)]
    outputs.append(scene_of(*TWO.objects, world.Object("square", "blue", "small", "top")))
    clips = clips_of(*outputs)

    def right(told):
        values = [benchmark.score_phrasing("clips, known", sample_of(TWO, told), clip, clips[5], None)
                  for clip in clips]  # fmt: skip
        return [value["clips", "known"] for value in values]

    assert right(TWO) == [False] * 5 + [True] + [False] * 3
    free = world.Scene(None, [GREEN, CYAN._replace(size=None, cell=None)])
    assert right(free) == [False, False, True, True, False, True, True, False, False]


def test_clips_are_scored_by_what_is_where_and_how_it_moves():
    swapped = scene_of(world.Object(*CYAN[:2], *GREEN[2:]), world.Object(*GREEN[:2], *CYAN[2:]))
    still, sample = scene_of(GREEN._replace(motion="standing still"), CYAN), sample_of(TWO)
    clips = clips_of(TWO, swapped, still, scene_of(GREEN))
    casts = [benchmark.score_cast("2", sample, clip, clips[0], None) for clip in clips]
    names = ("identities kept", "motion class", "identities right", "identities swapped")
    assert [tuple(cast["2", name] for name in names) for cast in casts] == [
        (True, True, True, False), (True, False, False, True),
        (True, False, True, False), (False, False, False, False),
    ]  # fmt: skip
    assert [cast["2", "first frame, dB"] > 59 for cast in casts] == [True, False, True, False]
    flicker = torch.tensor([0.08, -0.08] * 4 + [0.08])[:, None, None]
    clips += [clips[0][:, [0, 1, 2, 3, 7, 4, 5, 6, 8]], clips[0] + flicker]
    [white] = clips_of(TWO._replace(background="white"))
    clips += [white, torch.cat([clips[0][:, :4], white[:, 4:]], 1)]
    rows = [benchmark.score_clip("clips", sample, clip, None, None) for clip in clips]
    names = ("subject consistency", "motion smoothness", "dynamic degree", "motion class")
    assert [tuple(row[name, "right"] for name in names) for row in rows[:6]] == [
        (True, True, True, True), (True, True, True, False), (True, True, False, False),
        (True, True, True, False), (True, False, True, True), (True, True, True, True),
    ]  # fmt: skip
    assert [round(row["temporal flickering", "gray levels"]) for row in rows[:6]] == [0] * 5 + [20]
    assert [row["background consistency", "right"] for row in rows] == [True] * 7 + [False]


def test_answers_are_scored_fact_by_fact():
    sample = sample_of(scene_of(GREEN), video=TWO)
    for text, wrong in (
        ("A video on a gray background. A small green cross starts at the left and is growing.", ""),
        ("a video on a gray background. a large green cross starts at the top left and is moving left.",
         "size motion cell"),
        ("An image on a white background. A small blue circle is at the left.",
         "colour shape background motion"),
        ("a small green cross grows at the left", "colour shape background motion size cell"),
    ):  # fmt: skip
        values = benchmark.score_answer("clips", sample, text, None, None)
        assert len(values) == 6
        assert {name for (name, _), right in values.items() if not right} == {*wrong.split()}, text


def test_captions_may_choose_only_what_the_prompt_leaves_free():
    clip, image = torch.zeros(3, 9, 64, 64), torch.zeros(3, 1, 64, 64)
    free = world.Scene(None, [RED._replace(color=None, size=None, cell=None), BLUE._replace(cell=None)])
    sample = sample_of(scene_of(RED, BLUE), free, relation="left of")
    for objects, target, kept in (
        ((RED, BLUE), clip, True),
        ((BLUE, RED), clip, True),
        ((RED._replace(color="green"), BLUE), clip, True),
        ((RED, BLUE), image, False),
        ((RED,), clip, False),
        ((RED._replace(motion="shrinking"), BLUE), clip, False),
        ((RED, BLUE._replace(color="green")), clip, False),
        ((RED._replace(cell="right"), BLUE._replace(cell="left")), clip, False),
    ):
        answer = world.describe(scene_of(*objects), clip=True)
        score = benchmark.score_caption("x, known", sample, answer, target, None)
        assert score == {("x", "known"): kept}, objects
    answer = world.describe(scene_of(RED, BLUE, ground="white"), clip=True)
    score = benchmark.score_caption("x", sample_of(sample.target), answer, clip, None)
    assert score == {("x", "right"): False}


def test_the_overlap_of_shapes_falls_when_corners_are_lost():
    square = world.Object("square", "red", "large", "left", "moving right")
    sample = sample_of(scene_of(square))
    sharp, melted = clips_of(sample.target, scene_of(square._replace(shape="circle")))
    late = torch.cat([sharp[:, :8], melted[:, 8:]], 1)
    scores = [benchmark.score_shapes("x", sample, clip, None, None) for clip in (sharp, late, melted)]
    assert [score["x", "0.85 in all frames"] for score in scores] == [True, False, False]
    assert scores[0]["x", "overlap"] > 0.99 > scores[1]["x", "overlap"] > scores[2]["x", "overlap"] < 0.85


def test_perfect_outputs_get_the_best_score_in_every_benchmark(toy):
    ideal = dict.fromkeys(["answer", "rewrite"], lambda batch: batch.answers)
    ideal |= dict.fromkeys(["generate", "autoencode"], lambda batch: batch.target)
    results, _ = benchmark.measure(benchmark.SUITES, 4, toy, "cpu", ideal)
    assert [len(values) for values in results.values()] == [12, 12, 18, 6, 13, 12, 18, 6, 9, 4, 4]
    for (row, column), values in itertools.chain(*[suite.items() for suite in results.values()]):
        if column == "overlap":  # rarely just 1: outlines are centred on the pixels that are seen
            values = [value > 0.9 for value in values]
        best = {"identities swapped": False, "gray levels": 0}.get(column, True)
        best = 60 if column.endswith("dB") else best
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
    monkeypatch.setattr(Vino, "rewrite", lambda self, prompts, seed: expanded.extend(prompts) or prompts)
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
    condition = model.mm_encoder(["a red circle"], [])
    latents, t = torch.randn(1, 16, 1, 8, 8), torch.tensor([0.5])
    recorder = benchmark.AttentionShares(64, model.config.num_queries)
    watched = model.transformer(latents, t, condition, recorder)
    torch.testing.assert_close(watched, model.transformer(latents, t, condition))
    blocks = model.config.mmdit.num_layers + model.config.mmdit.num_single_layers
    assert len(recorder.text) == blocks
    assert all(0 < q < text < 1 for q, text in zip(recorder.of_queries, recorder.text))
    assert 0 < benchmark.queries_share(model, "a red circle", steps=2) < 1


def test_figure_13_tells_long_from_short_prompts_with_and_without_queries(toy, monkeypatch):
    monkeypatch.setattr(benchmark, "queries_share", lambda model, prompt: 0.25)
    sampling, removed = SimpleNamespace(rewrite=True), []
    model = SimpleNamespace(
        config=SimpleNamespace(sampling=sampling), remove_queries=lambda: removed.append(1)
    )
    ways = {"generate": lambda batch: batch.target * (not removed)}
    lines = benchmark.table({"queries": benchmark.compare_queries(model, toy, 3, "cpu", ways)}).splitlines()
    assert (
        lines[-2] == "| long prompts | 12 | 25.00 ± 0.00 | 100.0% (75.7% to 100.0%) | 0.0% (0.0% to 24.3%) |"
    )
    assert (
        lines[-1] == "| short prompts | 12 | 25.00 ± 0.00 | 100.0% (61.0% to 100.0%) | 0.0% (0.0% to 39.0%) |"
    )
    assert not sampling.rewrite


# --- Pictures -----------------------------------------------------------------------------------------------


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
        assert picture.height > 2 * 96 and picture.width > (1 + 3 + 3 + 3 + 3) * 64
    figures.gallery(columns, tmp_path / "gallery.gif", tasks=("tv2v",))
    with Image.open(tmp_path / "gallery.gif") as picture:
        assert picture.n_frames == 9


def test_a_caption_in_other_words_describes_no_scene():
    right = "An image on a gray background. A small red circle is at the top."
    assert benchmark.read_caption(right)[1].objects[0][:4] == ("circle", "red", "small", "top")
    for wrong in (right.replace("small", "banana"), right.replace("gray", "pink"), right + " Or two."):
        assert benchmark.read_caption(wrong) == (None, world.Scene(None, []))


@pytest.mark.parametrize("call", ["imgedit", "--weights missing.safetensors"])
def test_a_suite_or_a_file_that_does_not_exist_is_one_line(call, tmp_path, capsys):
    assert benchmark.main([*call.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search("imgedit|missing.safetensors", error)


@pytest.mark.parametrize(
    "call, problem",
    [
        ("gallery a=b.safetensors --tasks t2q", "unknown task 't2q'"),
        ("gallery", "gallery needs NAME=PATH"),
        ("curves a=runs/stage3 runs/other", "curves needs NAME=PATH"),
        ("gallery a=b.safetensors --out note.txt", "note.txt should end in .png or .gif"),
        ("gallery target=b.safetensors", "a column of its own"),
        ("examples --out mine.png", "examples takes no NAME=PATH, --tasks or --out"),
        ("curves a=.", "metrics.jsonl is not a run's metrics"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_one_line(call, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("metrics.jsonl").write_text("not a record\n")
    assert figures.main(call.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
