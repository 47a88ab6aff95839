"""The pattern explorer: its numbers are DilationPattern's, and it can be used without a mouse."""

import math
import random
import warnings
from pathlib import Path

import pytest

import longnet
from longnet import DilationPattern

pytestmark = pytest.mark.browser
PAGE = Path(longnet.__file__).parent / "explorer" / "pattern.html"

NUMBERS = """([text, tokens, heads, dim, causal, ranks]) => {
  const e = window.explorer, p = e.parse(text), reach = e.hops(p, tokens);
  const offset = (r, head) => ((p.offsets === "mod" ? head : Math.floor(head / Math.ceil(heads / r))) + p.shift) % r;
  let drawn = 0;
  for (const branch of e.allBranches(p)) for (let i = 0; i < tokens; i += 7) for (let j = 0; j < tokens; j += 7)
    drawn += e.pairsBetween(
      branch, offset(branch[1], 0), i, Math.min(i + 7, tokens), j, Math.min(j + 7, tokens), causal);
  return {
    text: e.asText(p), flops: String(e.flops(p, tokens, heads, dim, causal)), drawn,
    coverage: e.coverage(p, tokens, heads), rows: e.stateRows(p, tokens), hops: reach === Infinity ? "never" : reach,
    traffic: e.traffic(p, tokens, ranks, heads, dim, 2, causal), joined: e.joined(p, tokens, heads),
  };
}"""


def draw(random):
    branches = set()
    while len(branches) < random.randint(1, 4):
        branches.add((random.choice([random.randint(1, 90), 2 ** random.randint(0, 7)]),
                      random.choice([1, 2, 4, random.randint(1, 12)])))  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # a pattern without a rate of 1
        return DilationPattern(
            *map(tuple, zip(*branches, strict=True)),
            head_offsets=random.choice(["mod", "block"]), queries=random.choice(["kept", "all"]),
            offset_shift=random.choice([0, random.randint(0, 9)]),
            global_tokens=random.choice([0, 0, random.randint(1, 40)]),
        )  # fmt: skip


def attended(pattern, tokens, heads, is_causal, head=None):
    """Count the pairs of a head, branch by branch, or the set of pairs that any head joins."""
    return [
        (q, k)
        for w, r in pattern.branches
        for s in (pattern.offset(r, g, heads) for g in (range(heads) if head is None else [head]))
        for q in range(tokens)
        for k in range(q // w * w, min(tokens, (q // w + 1) * w))
        if k % w % r == s and (pattern.queries == "all" or q % w % r == s) and (k <= q or not is_causal)
    ] + [
        (q, k)
        for _ in (range(heads) if head is None else [head])
        for k in range(min(tokens, pattern.global_tokens))
        for q in range(k if is_causal else 0, tokens)
    ]


def test_its_numbers_are_the_patterns(browser):
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    chance = random.Random(0)
    for number in range(200):
        pattern, tokens = draw(chance), chance.randint(1, 120)
        heads, dim, ranks, is_causal = (
            chance.randint(1, 9),
            chance.randint(1, 64),
            chance.randint(1, 6),
            number % 2 == 0,
        )
        told = page.evaluate(NUMBERS, [str(pattern), tokens, heads, dim, is_causal, ranks])
        assert told["text"] == str(pattern)
        assert int(told["flops"]) == pattern.flops(tokens=tokens, num_heads=heads, head_dim=dim, is_causal=is_causal)
        assert told["coverage"] == pytest.approx(pattern.coverage(tokens=tokens, num_kv_heads=heads), rel=1e-14)
        assert told["rows"] == pattern.state_rows(tokens=tokens)
        hops = pattern.hops(tokens=tokens)
        assert told["hops"] == ("never" if hops == math.inf else hops), pattern
        assert tuple(told["traffic"]) == pattern.traffic(
            tokens=tokens, ranks=ranks, num_kv_heads=heads, head_dim=dim, itemsize=2, is_causal=is_causal
        )
        if number < 40:
            assert told["drawn"] == len(attended(pattern, tokens, heads, is_causal, head=0)), pattern
            pairs = set(attended(pattern, tokens, heads, is_causal=True))
            for distance, share in told["joined"]:
                exact = sum((k + distance, k) in pairs for k in range(tokens - distance)) / (tokens - distance)
                assert share == pytest.approx(exact, rel=1e-12)
    far = DilationPattern.geometric()
    asked = """text => {
      const p = explorer.parse(text);
      return [String(explorer.flops(p, 2 ** 30, 12, 64, true)), explorer.hops(p, 2 ** 30)];
    }"""
    told = page.evaluate(asked, str(far))
    assert int(told[0]) == far.flops(tokens=2**30, num_heads=12, head_dim=64, is_causal=True)
    assert told[1] == far.hops(tokens=2**30)
    page.close()


def test_it_shows_and_nothing_overflows(show):
    page = show(PAGE)
    assert "2.18 × less" in page.locator("#numbers").inner_text()
    assert page.locator("#problem").inner_text() == ""


def test_it_can_be_used_without_a_mouse(browser):
    page = browser.new_page()
    page.goto(PAGE.as_uri() + "#p=8:1,16:2;all&n=32&h=2&c=1&q=9")
    assert page.get_by_label("Tokens", exact=True).input_value() == "32"
    assert "Query 9 attends" in page.locator("#told").inner_text()
    assert "head 0: 8:1 2, 16:2 5; head 1: 8:1 2, 16:2 5." in page.locator("#told").inner_text()
    colours = page.evaluate("[...element('keys').getContext('2d').getImageData(0, 2, 32, 1).data]")[::4]
    assert [place for place, red in enumerate(colours) if red < 255] == [8, 9]  # the first branch's keys, and no others
    page.locator("#matrix").focus()
    page.keyboard.press("ArrowDown")
    assert "Query 10 attends" in page.locator("#told").inner_text()
    page.keyboard.press("+")
    assert "tokens 2 … 17" in page.locator("#window").inner_text()
    page.get_by_label("segment length of branch 2").fill("24")
    assert "p=8%3A1%2C24%3A2%3Ball" in page.evaluate("location.hash")
    pattern = DilationPattern((8, 24), (1, 2), queries="all")
    python = page.locator("#as-Python").inner_text()
    names = {"longnet": longnet}
    exec(python, names)  # noqa: S102
    assert names["pattern"] == pattern
    assert f"longnet show '{pattern}' --tokens 32 --heads 2" in page.locator("#as-CLI").inner_text()
    assert "segment_lengths = [8, 24]" in page.locator("#as-TOML").inner_text()
    page.get_by_label("dilation rate of branch 2").fill("0")
    assert "whole numbers of at least 1" in page.locator("#problem").inner_text()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button, canvas')].filter(part => !part.labels?.length"
        " && !part.getAttribute('aria-label') && !part.textContent.trim()).map(part => part.outerHTML)"
    )
    assert unnamed == []
    page.close()


def test_a_tap_lights_a_query(browser):
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix").bounding_box()
    page.touchscreen.tap(box["x"] + 5, box["y"] + box["height"] * 0.5)
    assert "Query 32 attends" in page.locator("#told").inner_text()
    context.close()
