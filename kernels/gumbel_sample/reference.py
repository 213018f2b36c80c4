"""Plain torch keyed sampling: the definition, the CPU implementation and what Triton is tested against.

Owns the bits (Philox), the noise (Gumbel), the sampler and the truncation threshold. Knows nothing
of requests, engines or how seeds are derived; ``rollout.seeds`` documents the counter layout.

Shape legend: B rows (one token is sampled for each), V vocabulary, N = ceil(V / 4) counters.

Sources: Philox4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). argmax(x + Gumbel) ~ softmax(x) is the Gumbel-max trick (Gumbel 1954; Maddison,
Tarlow and Minka, "A* sampling", 2014).
"""

import math

import torch

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

GUMBEL_MIN = -math.log(-math.log(2.0**-24))
"""Lowest noise, -2.8115: u = 2**-24."""
GUMBEL_MAX = -math.log(-math.log1p(-(2.0**-24)))
"""Highest noise, 16.6355: u = 1 - 2**-24."""

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TILE = 4096
"""Columns taken at a time: bounds memory. Constant, because a row's sum must not depend on B."""

# Zero-dimensional tensors: a Python scalar operand is wrapped anew in every call, which costs more
# than the arithmetic at the sizes of a decode step.
_MASK32 = torch.tensor(0xFFFFFFFF)
_SHIFT32 = torch.tensor(32)
_MULTIPLIERS = tuple(torch.tensor(multiplier) for multiplier in PHILOX_MULTIPLIERS)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Apply Philox4x32-10.

    Words are uint32 values held in int64 tensors. The low half of a product is used without cutting
    it to 32 bits: the bits above only ever reach bits that the next mask clears.

    Args:
        counter: Four int64 tensors of values in [0, 2**32), shapes broadcast.
        key: Two int64 tensors of values in [0, 2**32), shapes broadcast with the counter.

    Returns:
        Four int64 tensors of values in [0, 2**32), of the common shape.
    """
    c0, c1, c2, c3 = counter
    keys0, keys1 = (_key_schedule(k, step) for k, step in zip(key, PHILOX_KEY_STEPS, strict=True))
    for i in range(PHILOX_ROUNDS):
        product0 = torch.mul(c0, _MULTIPLIERS[0])
        product1 = torch.mul(c2, _MULTIPLIERS[1])
        c0 = torch.bitwise_right_shift(product1, _SHIFT32)
        c2 = torch.bitwise_right_shift(product0, _SHIFT32)
        if i < 3:  # The operands still grow to the common shape.
            c0, c2 = c0 ^ c1 ^ keys0[i], c2 ^ c3 ^ keys1[i]
        else:
            c0.bitwise_xor_(c1).bitwise_xor_(keys0[i])
            c2.bitwise_xor_(c3).bitwise_xor_(keys1[i])
        c0.bitwise_and_(_MASK32)
        c2.bitwise_and_(_MASK32)
        c1, c3 = product1, product0
    return c0, c1.bitwise_and_(_MASK32), c2, c3.bitwise_and_(_MASK32)


def _key_schedule(key: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    rounds = torch.arange(PHILOX_ROUNDS, device=key.device)
    return ((key.unsqueeze(-1) + rounds * step) & _MASK32).unbind(-1)


def uniform_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Map uint32 words to float32 uniforms (k + 1/2) / 2**23, k the top 23 bits.

    23 bits and a half fit the 24-bit significand, so every value is exact and lies in
    [2**-24, 1 - 2**-24]. With 24 bits the largest value would round to 1 and its Gumbel be infinite.

    Args:
        bits: Integer tensor of values in [0, 2**32).

    Returns:
        float32 tensor of the same shape.
    """
    return (bits >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def gumbel_noise(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    *,
    lane: int = 0,
    start: int = 0,
) -> torch.Tensor:
    """Return the noise of tokens start .. start + vocab_size - 1, each -log(-log(u)) in float32.

    Values lie in [GUMBEL_MIN, GUMBEL_MAX]. The cut tails bound what can be sampled: a token whose
    probability is more than exp(GUMBEL_MAX - GUMBEL_MIN), about 2.8e8, below another's never wins.

    Args:
        seeds: [B] int64 in [0, 2**63).
        positions: [B] int64 >= 0.
        vocab_size: Number of tokens.
        lane: Fourth counter word, in [0, 2**32).
        start: First token, a multiple of 4.

    Returns:
        [B, vocab_size] float32.

    Raises:
        ValueError: start is negative or no multiple of 4.
    """
    if start < 0 or start % 4:
        raise ValueError(f"start: got {start}, expected a multiple of 4 that is not negative")
    num_counters = -(-vocab_size // 4)
    index = torch.arange(start // 4, start // 4 + num_counters, device=seeds.device)
    seeds_B1, positions_B1 = seeds[:, None], positions[:, None]
    words = philox4x32(
        (index[None], positions_B1 & _MASK32, positions_B1 >> 32, torch.full_like(index[:1], lane)),
        (seeds_B1 & _MASK32, seeds_B1 >> 32),
    )
    noise_BN4 = torch.empty(len(seeds), num_counters, 4, dtype=torch.float32, device=seeds.device)
    for i, word in enumerate(words):
        noise_BN4[..., i] = word.bitwise_right_shift_(9)
    uniform = noise_BN4.add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_().flatten(1)[:, :vocab_size]


@torch.no_grad()
def gumbel_sample_reference(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None = None,
    lane: int = 0,
    draws: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row as argmax(x + Gumbel(seed, position, lane)), x = logits * (1 / T).

    x is float32; the reciprocal is rounded once per row, so every implementation has the same x.
    Equal maxima go to the lowest token. A row depends on nothing outside the row.

    T = 0 is greedy: argmax of the logits, the threshold ignored, and the log-probability is that of
    log_softmax(logits), the model's own at T = 1, because the distribution drawn from is a point.

    Logits may be -inf (masked tokens): these are chosen only if the whole row is -inf, which gives
    token 0 with log-probability -inf. NaN and +inf are the caller's fault and are not looked for:
    such a row yields some token in [0, V) and a meaningless log-probability.

    Args:
        logits: [B, V] float32, bfloat16 or float16; any row stride, last dimension contiguous.
        seeds: [B] int64 in [0, 2**63), the Philox key.
        positions: [B] int64 >= 0, absolute index of the token being sampled in prompt + output.
        temperature: [B] float32, 0 or a value whose reciprocal is finite (at least 2.94e-39).
        threshold: [B] float32; tokens with x below it are excluded. None keeps all.
        lane: Stream at this position, in [0, 2**32).
        draws: See `gumbel_sample`.

    Returns:
        tokens: [B] int64.
        logprobs: [B] float32, x[token] - logsumexp(x over the kept tokens): the log-probability
            under the distribution really sampled from.

    Raises:
        ValueError: A shape, dtype, device, stride or range is wrong.
    """
    check_arguments(logits, seeds, positions, temperature, threshold, lane)
    vocab_size = logits.shape[1]
    greedy_B1 = (temperature == 0)[:, None]
    has_greedy, is_all_greedy = bool(greedy_B1.any()), bool(greedy_B1.all())
    inverse_B1 = torch.where(greedy_B1, 1.0, temperature[:, None]).reciprocal_()
    floor_B1 = None if threshold is None else threshold[:, None].masked_fill(greedy_B1, -math.inf)

    tiles = []
    for start in range(0, vocab_size, _TILE):
        x = logits[:, start : start + _TILE].float() * inverse_B1
        if floor_B1 is not None:
            x = torch.where(x < floor_B1, -math.inf, x)
        perturbed = x
        if not is_all_greedy:
            if draws is None:
                noise = gumbel_noise(seeds, positions, x.shape[1], lane=lane, start=start)
            else:
                rows, places = draws
                noise = gumbel_noise(seeds[rows], positions[rows], x.shape[1], lane=lane, start=start)[places]
            perturbed = x + (noise.masked_fill_(greedy_B1, 0.0) if has_greedy else noise)
        place = perturbed.argmax(-1, keepdim=True)
        best, chosen = perturbed.gather(1, place), x.gather(1, place)
        tiles.append((best, place + start, chosen, x.logsumexp(-1, keepdim=True)))

    best, tokens, chosen, totals = (torch.cat(parts, 1) for parts in zip(*tiles, strict=True))
    winner = best.argmax(-1, keepdim=True)  # the first of equal maxima, so the lower token
    token, x_token = tokens.gather(1, winner).squeeze(1), chosen.gather(1, winner).squeeze(1)
    logprob = x_token - totals.logsumexp(-1)
    return token, logprob.masked_fill_(x_token == -math.inf, -math.inf)


@torch.no_grad()
def truncation_threshold(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the lowest x = logits * (1 / T) that each row keeps.

    The three cuts follow one another: min-p keeps x >= max(x) + log(min_p); top-k keeps the k
    highest of these; top-p keeps the smallest set of highest tokens whose mass, renormalised over
    what is left, is at least p, and always one. All ties with the last kept value are kept, which
    makes the result a function of the values alone, not of a sort's order among equals.

    On the CPU only the rows with top-k or top-p are sorted; on CUDA all are, because choosing rows
    would wait for the device. Pass None for what no row uses: without top_k and top_p nothing is sorted.

    Args:
        logits: [B, V] float32, bfloat16 or float16, free of NaN and +inf.
        temperature: [B] float32 >= 0; rows with 0 are greedy and get -inf.
        top_k: [B] integer; 0 or at least V is off for the row.
        top_p: [B] float32 in (0, 1]; 1 is off for the row.
        min_p: [B] float32 in [0, 1]; 0 is off for the row.

    Returns:
        [B] float32, -inf where nothing is cut.

    Raises:
        ValueError: A shape, dtype, device or range (CPU only) is wrong.
    """
    _check_logits(logits)
    _check_vector("temperature", temperature, logits, torch.float32)
    _check_cuts(logits, temperature, top_k, top_p, min_p)
    greedy = temperature == 0
    inverse = torch.where(greedy, 1.0, temperature).reciprocal_()
    threshold = torch.full_like(temperature, -math.inf)
    if min_p is not None:
        # The product rounds monotonically, so the largest x is the largest logit's.
        threshold = logits.amax(-1).float() * inverse + min_p.log()
    if top_k is not None or top_p is not None:
        needs = torch.zeros_like(greedy)
        if top_k is not None:
            needs |= (top_k > 0) & (top_k < logits.shape[1])
        if top_p is not None:
            needs |= top_p < 1
        needs &= ~greedy
        rows = torch.arange(len(logits), device=logits.device) if logits.is_cuda else needs.nonzero().squeeze(1)
        if len(rows):
            x = logits[rows].float() * inverse[rows, None]
            cut = _sorted_cut(
                x,
                threshold[rows],
                None if top_k is None else top_k[rows],
                None if top_p is None else top_p[rows],
            )
            threshold[rows] = torch.where(needs[rows], cut, threshold[rows])
    return threshold.masked_fill_(greedy, -math.inf)


def _sorted_cut(
    x: torch.Tensor, floor: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """Return the threshold of rows x [R, V] that are already cut at floor [R], by top-k and then top-p."""
    vocab_size = x.shape[1]
    ordered = x.sort(-1, descending=True).values
    if top_k is not None:
        last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
        floor = torch.maximum(floor, ordered.gather(1, last.long()[:, None]).squeeze(1))
    if top_p is None:
        return floor
    # float64: whether a token is the one that reaches p must not hang on the rounding of a long sum.
    mass = ordered.double().masked_fill_(ordered < floor[:, None], -math.inf).softmax(-1)
    before = mass.cumsum(-1) - mass
    num_kept = ((before < top_p.double()[:, None]) & (mass > 0)).sum(-1).clamp(min=1)
    cut = ordered.gather(1, num_kept[:, None] - 1).squeeze(1)
    return torch.where(top_p < 1, torch.maximum(floor, cut), floor)


def check_arguments(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None,
    lane: int,
    with_ranges: bool = True,
) -> None:
    """Raise ValueError unless the arguments of a sampler fit; ranges of CUDA tensors are not read."""
    _check_logits(logits)
    _check_vector("seeds", seeds, logits, torch.int64)
    _check_vector("positions", positions, logits, torch.int64)
    _check_vector("temperature", temperature, logits, torch.float32)
    if threshold is not None:
        _check_vector("threshold", threshold, logits, torch.float32)
    if not 0 <= lane < 2**32:
        raise ValueError(f"lane: got {lane}, expected a value in [0, 2**32)")
    if with_ranges and logits.device.type == "cpu":
        _check_range("seeds", seeds, seeds >= 0, "values in [0, 2**63)")
        _check_range("positions", positions, positions >= 0, "values of at least 0")
        _check_temperature(temperature)


def _check_cuts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    if top_k is not None:
        _check_vector("top_k", top_k, logits, torch.int32, torch.int64)
    if top_p is not None:
        _check_vector("top_p", top_p, logits, torch.float32)
    if min_p is not None:
        _check_vector("min_p", min_p, logits, torch.float32)
    if logits.device.type != "cpu":
        return
    _check_temperature(temperature)
    if top_k is not None:
        _check_range("top_k", top_k, top_k >= 0, "values of at least 0 (0 is off)")
    if top_p is not None:
        _check_range("top_p", top_p, (top_p > 0) & (top_p <= 1), "values in (0, 1] (1 is off)")
    if min_p is not None:
        _check_range("min_p", min_p, (min_p >= 0) & (min_p <= 1), "values in [0, 1] (0 is off)")


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, V] with V > 0")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits: got {logits.dtype}, expected one of {LOGITS_DTYPES}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: got strides {logits.stride()}, expected a contiguous last dimension")


def _check_vector(name: str, vector: torch.Tensor, logits: torch.Tensor, *dtypes: torch.dtype) -> None:
    if vector.shape != logits.shape[:1]:
        raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected [{logits.shape[0]}]")
    if vector.dtype not in dtypes:
        raise ValueError(f"{name}: got {vector.dtype}, expected {' or '.join(map(str, dtypes))}")
    if vector.device != logits.device:
        raise ValueError(f"{name}: got device {vector.device}, expected {logits.device} as the logits")


def _check_temperature(temperature: torch.Tensor) -> None:
    legal = (temperature == 0) | ((temperature > 0) & (temperature.reciprocal() < math.inf) & (temperature < math.inf))
    _check_range("temperature", temperature, legal, "0 or a finite positive value with a finite reciprocal")


def _check_range(name: str, values: torch.Tensor, legal: torch.Tensor, expected: str) -> None:
    if not legal.all():
        raise ValueError(f"{name}: got {values[~legal][0].item()}, expected {expected}")
