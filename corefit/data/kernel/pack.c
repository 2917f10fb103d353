/* Lengths -> plan. The twins in pack.py say what each algorithm does; ties always go to the lower number. */
#include "kernel.h"

#define CAPACITY (1 << 24) /* the largest */
#define BLOCK 16           /* packs that are looked at together */
#define BUCKETS 256        /* of lengths that share a bound */
#define LEVELS 4           /* 64^4 = CAPACITY */
#define DIGIT 14           /* bits of a length that are sorted by at a time */

#if defined(__GNUC__)
#define HIGHEST(word) (63 - __builtin_clzll(word))
#define LOWEST(word) __builtin_ctzll(word)
#else
static int HIGHEST(uint64_t word) { int bit = 0; while (word >>= 1) bit++; return bit; }
static int LOWEST(uint64_t word) { int bit = 0; while (!(word & 1)) word >>= 1, bit++; return bit; }
#endif

/* ------------------------------------------------------------------------------------------------ a set of numbers */

/* A bit for each of 0 .. n-1, and above every 64 words of a level a word that says which of them hold any. */
typedef struct { uint64_t *level[LEVELS], *words; } Set;

static int set_make(Set *set, int64_t n) {
    int64_t size[LEVELS], all = 0;
    for (int l = 0; l < LEVELS; l++) all += size[l] = (n = (n + 63) / 64) + 1; /* one more: above() may look there */
    if (!(set->words = calloc((size_t)all, 8))) return 0;
    for (int64_t l = 0, at = 0; l < LEVELS; at += size[l++]) set->level[l] = set->words + at;
    return 1;
}

static void set_add(Set *set, int64_t x) {
    for (int l = 0; l < LEVELS; l++, x >>= 6) {
        uint64_t before = set->level[l][x >> 6];
        set->level[l][x >> 6] = before | 1ull << (x & 63);
        if (before) return;
    }
}

static void set_remove(Set *set, int64_t x) {
    for (int l = 0; l < LEVELS; l++, x >>= 6) if (set->level[l][x >> 6] &= ~(1ull << (x & 63))) return;
}

/* The largest number that is at most x, or -1. */
static int64_t set_below(const Set *set, int64_t x) {
    for (int l = 0; l < LEVELS && x >= 0; l++, x = (x >> 6) - 1) {
        uint64_t word = set->level[l][x >> 6] & (~0ull >> (63 - (x & 63)));
        if (!word) continue;
        for (x = (x & ~63ll) + HIGHEST(word); l--;) x = x * 64 + HIGHEST(set->level[l][x]);
        return x;
    }
    return -1;
}

/* The smallest number that is at least x, or -1. */
static int64_t set_above(const Set *set, int64_t x) {
    for (int l = 0; l < LEVELS; l++, x = (x >> 6) + 1) {
        uint64_t word = set->level[l][x >> 6] & (~0ull << (x & 63));
        if (!word) continue;
        for (x = (x & ~63ll) + LOWEST(word); l--;) x = x * 64 + LOWEST(set->level[l][x]);
        return x;
    }
    return -1;
}

/* ------------------------------------------------------------------------------------------- plans of all lengths */

typedef struct {
    const int32_t *lengths;
    int32_t *order, capacity, longest;
    int64_t n, total, *offsets;
} Problem;

/* Write order and offsets: of each pack, the samples in order of placement. pack_of[i] is where sequence[i] went, and
   offsets[k + 1] has how many went into pack k. */
static void group(const Problem *p, const int32_t *sequence, const int32_t *pack_of, int64_t packs) {
    int64_t *offsets = p->offsets;
    offsets[0] = 0;
    for (int64_t k = 0; k < packs; k++) offsets[k + 1] += offsets[k];
    for (int64_t i = 0; i < p->n; i++) p->order[offsets[pack_of[i]]++] = sequence ? sequence[i] : (int32_t)i;
    memmove(offsets + 1, offsets, (size_t)packs * 8); /* each has moved on to where the next one begins */
    offsets[0] = 0;
}

/* Samples from long to short, equal ones in order, sorted by the lower DIGIT bits and then by those above, if there are
   any. The caller frees it; NULL: no memory. */
static int32_t *sort_decreasing(const Problem *p) {
    int32_t *from = NULL, *to = NULL;
    for (int shift = 0; shift == 0 || p->longest >> shift; shift += DIGIT) {
        int32_t digits = p->longest >> shift < 1 << DIGIT ? (p->longest >> shift) + 1 : 1 << DIGIT, before = 0;
        int32_t *starts = calloc((size_t)digits, 4), mask = (1 << DIGIT) - 1;
        to = starts ? malloc((size_t)(p->n + 1) * 4) : NULL;
        for (int64_t i = 0; to && i < p->n; i++) starts[p->lengths[i] >> shift & mask]++;
        for (int32_t digit = digits; to && digit--;) {
            int32_t here = starts[digit];
            starts[digit] = before;
            before += here;
        }
        for (int64_t i = 0; to && i < p->n; i++) {
            int32_t sample = from ? from[i] : (int32_t)i;
            to[starts[p->lengths[sample] >> shift & mask]++] = sample;
        }
        free(starts);
        free(from);
        if (!(from = to)) break;
    }
    return from;
}

/* How many samples from `at` on are as long as the one there, found in steps that double and then halve. */
static int64_t equal_from(const Problem *p, const int32_t *sequence, int64_t at) {
    int64_t n = 1, step = 1;
    int32_t w = p->lengths[sequence[at]];
    for (; at + n + step <= p->n && p->lengths[sequence[at + n + step - 1]] == w; step *= 2) n += step;
    for (; step; step /= 2) if (at + n + step <= p->n && p->lengths[sequence[at + n + step - 1]] == w) n += step;
    return n;
}

/* The first of BLOCK packs that has room for w, or BLOCK. */
static inline int64_t first_of(const int32_t *room, int32_t w) {
    int32_t first = BLOCK;
    for (int32_t j = BLOCK - 1; j >= 0; j--) first = room[j] >= w ? j : first;
    return first;
}

/* Rooms only ever shrink, so the first block with room for w never moves left, and it lies no further left than that
   of any shorter length. `from` holds a lower bound for each length, `bound` one for all lengths of a bucket and more;
   `top` holds upper bounds on the room in a block, made exact when it was looked at in vain. A pack that isn't opened
   yet is one with all its room, and of two neighbours at least one is half full, which bounds their number. */
static int64_t first_fit(const Problem *p, int64_t open, int32_t *pack_of) {
    int64_t blocks = (2 * p->total / p->capacity + 2) / BLOCK + 1, packs = 0, bound[BUCKETS + 2] = {0};
    int32_t *room = malloc((size_t)blocks * BLOCK * 4), *top = malloc((size_t)blocks * 4);
    int32_t *from = calloc((size_t)p->longest + 1, 4), shift = 0;
    while (p->longest >> shift >= BUCKETS) shift++;
    for (int64_t k = 0; room && k < blocks * BLOCK; k++) room[k] = p->capacity;
    for (int64_t k = 0; top && k < blocks; k++) top[k] = p->capacity;
    for (int64_t i = 0; room && top && from && i < p->n; i++) {
        int32_t w = p->lengths[i];
        int64_t bucket = w >> shift, block = from[w] > bound[bucket] ? from[w] : bound[bucket], first;
        for (;; block++) {
            if (top[block] < w) continue;
            if ((first = first_of(room + block * BLOCK, w)) < BLOCK) break;
            int32_t most = 0;
            for (int j = 0; j < BLOCK; j++) most = room[block * BLOCK + j] > most ? room[block * BLOCK + j] : most;
            top[block] = most;
        }
        from[w] = (int32_t)block;
        bucket += (w & ((1 << shift) - 1)) != 0; /* the lengths there are all at least w */
        if (bound[bucket] < block) bound[bucket] = block;
        int64_t pack = block * BLOCK + first;
        room[pack] -= w;
        pack_of[i] = (int32_t)pack;
        if (pack == packs) {
            if (packs++ >= open) room[pack - open] = 0; /* closed */
            p->offsets[packs] = 0;
        }
        p->offsets[pack + 1]++;
    }
    int failed = !room || !top || !from;
    free(room);
    free(top);
    free(from);
    return failed ? -1 : packs;
}

typedef struct { int32_t first, count, child, next; } Run; /* packs side by side with equal room; a node of a heap */

/* Pairing heaps of runs by their first pack; 0 is the empty one. Source: Fredman et al. 1986, "The pairing heap". */
static int32_t meld(Run *runs, int32_t a, int32_t b) {
    if (!a || !b) return a + b;
    if (runs[b].first < runs[a].first) {
        int32_t c = a;
        a = b;
        b = c;
    }
    runs[b].next = runs[a].child;
    runs[a].child = b;
    return a;
}

static int32_t without_first(Run *runs, int32_t heap) {
    int32_t pairs = 0, a = runs[heap].child, after;
    for (heap = 0; a; a = after) {
        int32_t b = runs[a].next;
        after = b ? runs[b].next : 0;
        a = meld(runs, a, b);
        runs[a].next = pairs;
        pairs = a;
    }
    for (; pairs; pairs = after) {
        after = runs[pairs].next;
        heap = meld(runs, heap, pairs);
    }
    return heap;
}

/* A sample goes where the least room is that it fits into, and there the next of the same length follows while it fits:
   so equal samples fill runs of equal packs, and the work grows with the number of distinct lengths. */
static int64_t best_fit(const Problem *p, const int32_t *sequence, int32_t *pack_of) {
    int32_t *heaps = calloc((size_t)p->capacity + 1, 4), n_runs = 1, spare = 0; /* by room */
    int64_t most = 2 * p->total / p->capacity + 2, packs = 0, at = 0;
    Run *runs = malloc((size_t)((most < p->n ? most : p->n) + 2) * sizeof *runs); /* little of it is ever touched */
    Set rooms = {{0}, NULL};
    int failed = !heaps || !runs || !set_make(&rooms, p->capacity);
    while (at < p->n && !failed) {
        int64_t w = p->lengths[sequence[at]], left = equal_from(p, sequence, at);
        while (left) {
            int64_t room = set_above(&rooms, w);
            int32_t run = room < 0 ? 0 : heaps[room], same = 0;
            if (!run) room = p->capacity;
            int64_t each = room / w, n = left / each, first = run ? runs[run].first : packs;
            if (!n) n = 1, each = left;
            if (run && n > runs[run].count) n = runs[run].count;
            for (int64_t k = first; k < first + n; k++) {
                p->offsets[k + 1] = each + (k < packs ? p->offsets[k + 1] : 0);
                for (int64_t j = 0; j < each; j++) pack_of[at++] = (int32_t)k;
            }
            if (!run) packs += n;
            left -= n * each;
            if (run && n < runs[run].count) { /* the others of the run are still the first ones of its heap */
                runs[run].first += (int32_t)n;
                runs[run].count -= (int32_t)n;
            } else if (run) {
                heaps[room] = without_first(runs, run);
                if (!heaps[room]) set_remove(&rooms, room);
                same = run;
            }
            room -= each * w;
            if (!same && room) {
                same = spare ? spare : n_runs++;
                if (spare) spare = runs[spare].next;
            }
            if (same) runs[same] = (Run){(int32_t)first, (int32_t)n, 0, room ? 0 : spare};
            if (!room) {
                if (same) spare = same;
                continue;
            }
            if (!heaps[room]) set_add(&rooms, room);
            heaps[room] = meld(runs, heaps[room], same);
        }
    }
    free(heaps);
    free(runs);
    free(rooms.words);
    return failed ? -1 : packs;
}

/* ---------------------------------------------------------------------------------------------------- streaming */

typedef struct {
    const Problem *p;
    const uint8_t *ends;
    int64_t held, n_held, open, *seen, packs, packed; /* packed: samples in closed packs */
    int flush;
} Feed;

/* Whether packs may close once i samples are taken in. */
static int may_close(const Feed *f, int64_t i) { return i == f->n_held || (i > f->n_held && f->ends[i - 1]); }

static int ascending(const void *a, const void *b) {
    return (*(const int32_t *)a > *(const int32_t *)b) - (*(const int32_t *)a < *(const int32_t *)b);
}

static void close_pack(Feed *f, int64_t seen) {
    f->seen[f->packs++] = seen;
    f->p->offsets[f->packs] = f->packed;
}

static int stream_decreasing(Feed *f) {
    const Problem *p = f->p;
    int32_t *first = calloc((size_t)p->longest + 1, 4), *last = malloc(((size_t)p->longest + 1) * 4); /* by length */
    int32_t *next = calloc((size_t)p->n + 1, 4); /* in the lists of equal ones sample i is i + 1, and 0 ends them */
    uint8_t *gone = calloc((size_t)p->n + 1, 1);
    int64_t oldest = 0, waiting = 0;
    Set lengths = {{0}, NULL};
    int failed = !first || !last || !next || !gone || !set_make(&lengths, p->capacity);
    for (int64_t i = 0; i <= p->n && !failed; i++) {
        while (waiting && ((waiting >= f->held && may_close(f, i)) || (i == p->n && f->flush))) {
            int64_t begin = f->packed, room = p->capacity;
            while (gone[oldest]) oldest++;
            for (int64_t w = p->lengths[oldest]; w > 0; w = set_below(&lengths, room - 1) + 1) {
                int32_t sample = first[w] - 1;
                if (!(first[w] = next[sample])) set_remove(&lengths, w - 1);
                p->order[f->packed++] = sample;
                gone[sample] = 1;
                room -= w;
                waiting--;
            }
            qsort(p->order + begin, (size_t)(f->packed - begin), 4, ascending);
            close_pack(f, i);
        }
        if (i == p->n) break;
        int32_t w = p->lengths[i];
        *(first[w] ? &next[last[w] - 1] : &first[w]) = (int32_t)i + 1;
        last[w] = (int32_t)i + 1;
        set_add(&lengths, w - 1);
        waiting++;
    }
    free(first);
    free(last);
    free(next);
    free(gone);
    free(lengths.words);
    return !failed;
}

static int stream_first_fit(Feed *f) {
    const Problem *p = f->p;
    int32_t *room = malloc((size_t)(p->n + 1) * 4), *pack_of = malloc((size_t)(p->n + 1) * 4);
    int64_t *sizes = calloc((size_t)p->n + 1, 8), packs = 0, waiting = 0, *offsets = p->offsets;
    int failed = !room || !pack_of || !sizes;
    for (int64_t i = 0; i <= p->n && !failed; i++) {
        while (f->packs < packs && ((i == p->n && f->flush) ||
                                    (may_close(f, i) && (packs - f->packs > f->open || waiting > f->held)))) {
            waiting -= sizes[f->packs];
            f->packed += sizes[f->packs];
            close_pack(f, i);
        }
        if (i == p->n) break;
        int64_t pack = f->packs;
        while (pack < packs && room[pack] < p->lengths[i]) pack++;
        if (pack == packs) room[packs++] = p->capacity;
        room[pack] -= p->lengths[i];
        sizes[pack]++;
        waiting++;
        pack_of[i] = (int32_t)pack;
    }
    for (int64_t i = 0; i < p->n && !failed; i++) {
        if (pack_of[i] < f->packs) p->order[offsets[pack_of[i] + 1] - sizes[pack_of[i]]--] = (int32_t)i;
    }
    free(room);
    free(pack_of);
    free(sizes);
    return !failed;
}

/* ------------------------------------------------------------------------------------------------------- Python */

/* NULL, or what is wrong. Also finds the longest length and the sum of all. */
static const char *check(Problem *p, const Py_buffer *lengths, const Py_buffer *order, const Py_buffer *offsets) {
    p->lengths = lengths->buf;
    p->order = order->buf;
    p->offsets = offsets->buf;
    p->n = lengths->len / 4;
    if (p->n > INT32_MAX - BLOCK) return "more samples than int32 can count";
    if (p->capacity < 1 || p->capacity > CAPACITY) return "capacity must be in [1, 2^24]";
    if (order->len / 4 < p->n || offsets->len / 8 < p->n + 1) return "order or offsets has less room than samples need";
    for (int64_t i = 0; i < p->n; i++) {
        if (p->lengths[i] < 1 || p->lengths[i] > p->capacity) return "lengths must be in [1, capacity]";
        p->total += p->lengths[i];
        p->longest = p->lengths[i] > p->longest ? p->lengths[i] : p->longest;
    }
    return NULL;
}

static PyObject *answer(const char *wrong, int64_t packs) {
    if (wrong) PyErr_SetString(PyExc_ValueError, wrong);
    else if (packs < 0) PyErr_NoMemory();
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(packs);
}

static int64_t make_plan(const Problem *p, int best, int64_t open) {
    int32_t *pack_of = malloc((size_t)(p->n + 1) * 4), *sequence = best ? sort_decreasing(p) : NULL;
    int64_t packs = -1;
    if (pack_of && (sequence || !best)) packs = best ? best_fit(p, sequence, pack_of) : first_fit(p, open, pack_of);
    if (packs >= 0) group(p, sequence, pack_of, packs);
    free(pack_of);
    free(sequence);
    return packs;
}

/* plan(lengths, order, offsets, capacity, best, open_packs) -> packs; best: best-fit decreasing, else first-fit */
static PyObject *plan(PyObject *self, PyObject *args) {
    PyObject *o[3];
    Py_buffer view[3];
    Problem p = {0};
    int best;
    long long open;
    int64_t packs = -1;
    const char *wrong;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOipL", &o[0], &o[1], &o[2], &p.capacity, &best, &open)) return NULL;
    if (!get_buffers(3, o, view, (const char *[]){"i", "i", "q"}, (const char *[]){"lengths", "order", "offsets"}, 1)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    wrong = open < 1 ? "open_packs must be at least 1" : check(&p, &view[0], &view[1], &view[2]);
    if (!wrong) packs = make_plan(&p, best, open);
    Py_END_ALLOW_THREADS
    release_buffers(3, view);
    return answer(wrong, packs);
}

/* stream(lengths, ends, order, offsets, seen, capacity, decreasing, held, n_held, flush, open_packs) -> packs */
static PyObject *stream(PyObject *self, PyObject *args) {
    PyObject *o[5];
    Py_buffer view[5];
    Problem p = {0};
    Feed f = {0};
    int decreasing;
    const char *wrong;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOipLLpL", &o[0], &o[1], &o[2], &o[3], &o[4], &p.capacity, &decreasing, &f.held,
                          &f.n_held, &f.flush, &f.open)) {
        return NULL;
    }
    if (!get_buffers(5, o, view, (const char *[]){"i", "B", "i", "q", "q"},
                     (const char *[]){"lengths", "ends", "order", "offsets", "seen"}, 2)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    wrong = check(&p, &view[0], &view[2], &view[3]);
    if (!wrong && (f.held < 1 || f.open < 1)) wrong = "held and open_packs must be at least 1";
    if (!wrong && (view[1].len < p.n || view[4].len / 8 < p.n)) wrong = "ends or seen is shorter than lengths";
    if (!wrong) {
        f.p = &p;
        f.ends = view[1].buf;
        f.seen = view[4].buf;
        p.offsets[0] = 0;
        if (!(decreasing ? stream_decreasing(&f) : stream_first_fit(&f))) f.packs = -1;
    }
    Py_END_ALLOW_THREADS
    release_buffers(5, view);
    return answer(wrong, f.packs);
}

PyMethodDef pack_methods[] = {
    {"plan", plan, METH_VARARGS, NULL}, {"stream", stream, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
