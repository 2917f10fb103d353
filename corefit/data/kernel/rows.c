/* Samples of packs -> the rows of a micro-batch. The twin is in rows.py. */
#include "kernel.h"

enum { START, LENGTH, SPAN, SPANS, STOP, SUPERVISED, RECORD, ORDINAL, COLUMNS }; /* of a sample, as in block.py */

static inline void put(void *out, int wide, int64_t at, int64_t value) {
    if (wide) ((int64_t *)out)[at] = value;
    else ((int32_t *)out)[at] = (int32_t)value;
}

/* Copy n ids, whatever the two widths are; each pairing is a loop that compilers vectorise. */
static void copy_ids(void *out, int wide, int64_t to, const void *in, int narrow, int64_t from, int64_t n) {
    int64_t *o64 = (int64_t *)out + (wide ? to : 0);
    int32_t *o32 = (int32_t *)out + (wide ? 0 : to);
    const uint16_t *i16 = (const uint16_t *)in + (narrow ? from : 0);
    const int32_t *i32 = (const int32_t *)in + (narrow ? 0 : from);
    if (!wide && !narrow) memcpy(o32, i32, (size_t)n * 4);
    else if (!wide) for (int64_t j = 0; j < n; j++) o32[j] = i16[j];
    else if (narrow) for (int64_t j = 0; j < n; j++) o64[j] = i16[j];
    else for (int64_t j = 0; j < n; j++) o64[j] = i32[j];
}

static void fill(void *out, int wide, int64_t at, int64_t n, int64_t value) {
    if (wide) for (int64_t j = 0; j < n; j++) ((int64_t *)out)[at + j] = value;
    else for (int64_t j = 0; j < n; j++) ((int32_t *)out)[at + j] = (int32_t)value;
}

static void count_up(void *out, int wide, int64_t at, int64_t n) {
    if (wide) for (int64_t j = 0; j < n; j++) ((int64_t *)out)[at + j] = j;
    else for (int32_t j = 0; j < (int32_t)n; j++) ((int32_t *)out)[at + j] = j;
}

typedef struct {
    Py_buffer tokens, spans, samples, sizes, ids, labels, positions, bounds;
    int64_t width, pad, ignore;
} Job;

/* NULL, or what is wrong. Nothing is written before everything is known to lie inside its buffer. */
static const char *check(const Job *job, int64_t *documents) {
    int64_t n = job->samples.len / (8 * COLUMNS), packs = job->sizes.len / 8;
    int64_t n_tokens = job->tokens.len / job->tokens.itemsize, n_spans = job->spans.len / 16;
    const int64_t *sample = job->samples.buf, *sizes = job->sizes.buf, *spans = job->spans.buf;
    int64_t slots = job->ids.len / job->ids.itemsize, seen = 0, docs = 0;
    if (job->samples.len % (8 * COLUMNS) || job->spans.len % 16) return "samples are int64 [n, 8], spans int64 [m, 2]";
    if (job->width < 1 || packs < 1 || slots / job->width != packs || slots % job->width) return "ids aren't packs x width";
    if (job->labels.buf && (job->labels.len != job->ids.len || job->labels.itemsize != job->ids.itemsize)) return "labels";
    if (job->positions.buf && (job->positions.len != job->ids.len || job->positions.itemsize != job->ids.itemsize)) {
        return "position_ids must be like input_ids";
    }
    for (int64_t k = 0; k < packs; k++) {
        int64_t used = 0;
        if (sizes[k] < 1 || sizes[k] > n - seen) return "sizes don't add up to the samples";
        for (int64_t i = seen; i < seen + sizes[k]; i++) {
            const int64_t *s = sample + i * COLUMNS;
            if (s[START] < 0 || s[LENGTH] < 1 || s[LENGTH] > n_tokens || s[START] > n_tokens - s[LENGTH]) {
                return "a sample lies outside the tokens";
            }
            if (s[SPAN] < 0 || s[SPANS] < 0 || s[SPANS] > n_spans || s[SPAN] > n_spans - s[SPANS]) {
                return "a sample's spans lie outside the spans";
            }
            for (int64_t j = s[SPAN]; j < s[SPAN] + s[SPANS]; j++) {
                if (spans[2 * j] < 0 || spans[2 * j] > spans[2 * j + 1]) return "a span ends before it begins";
            }
            if (s[LENGTH] > job->width - used) return "a pack is longer than its row";
            used += s[LENGTH];
        }
        seen += sizes[k];
        docs += sizes[k] + (used < job->width);
    }
    if (seen != n) return "sizes don't add up to the samples";
    *documents = docs;
    return job->bounds.buf && (slots > INT32_MAX || job->bounds.len / 4 < docs + 1) ? "cu_seqlens is too short, or can't count so many slots" : NULL;
}

static int64_t label(const Job *job, const int64_t *s, int64_t at, int wide, int narrow) {
    const int64_t *spans = (const int64_t *)job->spans.buf + 2 * s[SPAN];
    int64_t count = 0, end = s[START] + s[LENGTH];
    for (int64_t j = 0; j < s[SPANS]; j++) {
        int64_t a = spans[2 * j], b = spans[2 * j + 1];
        if (a <= s[START]) a = s[START] + 1; /* nothing inside the document precedes its first token */
        if (b > end) b = end;
        if (a >= b) continue;
        copy_ids(job->labels.buf, wide, at + a - s[START] - 1, job->tokens.buf, narrow, a, b - a);
        count += b - a;
        if (s[STOP] >= 0 && b == end) put(job->labels.buf, wide, at + s[LENGTH] - 2, s[STOP]);
    }
    return count;
}

static int64_t write_rows(const Job *job) {
    int wide = job->ids.itemsize == 8, narrow = job->tokens.itemsize == 2;
    const int64_t *s = job->samples.buf, *sizes = job->sizes.buf;
    int64_t packs = job->sizes.len / 8, supervised = 0, document = 0;
    int32_t *bounds = job->bounds.buf;
    for (int64_t k = 0; k < packs; k++) {
        int64_t at = k * job->width, end = at + job->width;
        if (job->labels.buf) fill(job->labels.buf, wide, at, job->width, job->ignore);
        for (int64_t i = 0; i < sizes[k]; i++, s += COLUMNS) {
            copy_ids(job->ids.buf, wide, at, job->tokens.buf, narrow, s[START], s[LENGTH]);
            if (s[STOP] >= 0) put(job->ids.buf, wide, at + s[LENGTH] - 1, s[STOP]);
            if (job->labels.buf) supervised += label(job, s, at, wide, narrow);
            if (job->positions.buf) count_up(job->positions.buf, wide, at, s[LENGTH]);
            if (bounds) bounds[document++] = (int32_t)at;
            at += s[LENGTH];
        }
        if (at == end) continue;
        fill(job->ids.buf, wide, at, end - at, job->pad);
        if (job->positions.buf) count_up(job->positions.buf, wide, at, end - at);
        if (bounds) bounds[document++] = (int32_t)at;
    }
    if (bounds) bounds[document] = (int32_t)(packs * job->width);
    return supervised;
}

static PyObject *gather(PyObject *self, PyObject *args) {
    PyObject *o[8], *result = NULL;
    Job job;
    (void)self;
    memset(&job, 0, sizeof job);
    if (!PyArg_ParseTuple(args, "OOOOOOOOLLL", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &o[7],
                          (long long *)&job.width, (long long *)&job.pad, (long long *)&job.ignore)) {
        return NULL;
    }
    Py_buffer *views[8] = {&job.tokens, &job.spans,  &job.samples,   &job.sizes,
                           &job.ids,    &job.labels, &job.positions, &job.bounds};
    const char *kinds[8] = {"Hi", "q", "q", "q", "iq", "iq", "iq", "i"};
    const char *names[8] = {"tokens", "spans", "samples", "sizes", "input_ids", "labels", "position_ids", "cu_seqlens"};
    int ok = 1;
    for (int i = 0; ok && i < 8; i++) {
        if (i > 4 && o[i] == Py_None) continue;
        ok = get_buffer(o[i], views[i], kinds[i], i > 3, names[i]) == 0;
    }
    if (ok) {
        int64_t documents = 0, supervised = 0;
        const char *wrong;
        Py_BEGIN_ALLOW_THREADS
        wrong = check(&job, &documents);
        if (!wrong) supervised = write_rows(&job);
        Py_END_ALLOW_THREADS
        if (wrong) PyErr_SetString(PyExc_ValueError, wrong);
        else result = Py_BuildValue("LL", (long long)documents, (long long)supervised);
    }
    for (int i = 0; i < 8; i++) PyBuffer_Release(views[i]);
    return result;
}

/* Lists of ids, and single ids, one after another into an int32 buffer; sizes tells how many each part gave. */
static PyObject *join_ids(PyObject *self, PyObject *args) {
    PyObject *parts, *out[2];
    Py_buffer view[2];
    (void)self;
    if (!PyArg_ParseTuple(args, "O!OO", &PyList_Type, &parts, &out[0], &out[1]) ||
        !get_buffers(2, out, view, (const char *[]){"i", "q"}, (const char *[]){"ids", "sizes"}, 0)) {
        return NULL;
    }
    int32_t *to = view[0].buf, *end = to + view[0].len / 4;
    Py_ssize_t n = PyList_Size(parts);
    const char *wrong = view[1].len / 8 < n ? "sizes is too short" : NULL;
    for (Py_ssize_t i = 0; i < n && !wrong && !PyErr_Occurred(); i++) {
        PyObject *part = PyList_GetItem(parts, i);
        int is_list = PyList_Check(part);
        Py_ssize_t m = is_list ? PyList_Size(part) : 1;
        ((int64_t *)view[1].buf)[i] = m;
        if (m > end - to) wrong = "ids is too short";
        for (Py_ssize_t j = 0; j < m && !wrong; j++) {
            long id = PyLong_AsLong(is_list ? PyList_GetItem(part, j) : part);
            if (id < 0 || id > INT32_MAX) {
                if (!PyErr_Occurred()) wrong = "an id isn't in [0, 2^31)";
                break;
            }
            *to++ = (int32_t)id;
        }
    }
    Py_ssize_t written = to - (int32_t *)view[0].buf;
    release_buffers(2, view);
    if (wrong) PyErr_SetString(PyExc_ValueError, wrong);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(written);
}

PyMethodDef rows_methods[] = {{"gather", gather, METH_VARARGS, NULL},
                              {"join_ids", join_ids, METH_VARARGS, NULL},
                              {NULL, NULL, 0, NULL}};
