/* JSON lines -> where the values of some fields are, and where the lines begin. The twins are in jsonl.py.

   extract() takes a line only where the twin certainly would, and stops before any other, be it bad or merely unusual:
   the twin decides, and says what is wrong. What it scans ends with a line feed, which no part of a line of JSON may
   hold: every loop stops there at the latest, so that only reads of whole blocks look for the end of the buffer. */
#include "kernel.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define DEPTH 64   /* levels taken; the twin takes 500 */
#define NUMBER 640 /* bytes of a number taken: the lowest limit on an integer's digits that Python can be set to */

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BLOCK 16 /* bytes looked at together, where the compiler has vectors */
#endif

typedef const uint8_t *Bytes;
typedef struct {
    Bytes name;
    Py_ssize_t size;          /* of the name */
    int64_t kind, begin, end; /* of its value in this line: where in the arena */
} Field;

enum { MISSING, STRING, OTHER }; /* kinds, as in jsonl.py */

typedef struct {
    Bytes end;           /* of what is scanned */
    uint8_t *arena, *to; /* to: where the next value goes; behind it there is as much room as there is left to scan */
    Field *fields;
    Py_ssize_t n;
} Scan;

/* ------------------------------------------------------------------------------------------------------- strings */

static int is_digit(uint8_t c) { return c >= '0' && c <= '9'; }

/* The value of a hexadecimal digit, and 1; 0: it is none. */
static const uint8_t HEX[256] = {
    ['0'] = 1,  ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
    ['8'] = 9,  ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16};

/* The value of four hexadecimal digits, or -1. */
static int32_t hex4(Bytes p) {
    uint32_t a = HEX[p[0]] - 1u, b = HEX[p[1]] - 1u, c = HEX[p[2]] - 1u, d = HEX[p[3]] - 1u;
    uint32_t value = a << 12 | b << 8 | c << 4 | d; /* what is no digit sets all bits */
    return value > 0xFFFF ? -1 : (int32_t)value;
}

/* What a letter behind a backslash means; 0: nothing. */
static const uint8_t MEANING[256] = {['"'] = '"',  ['\\'] = '\\', ['/'] = '/',  ['b'] = '\b',
                                     ['f'] = '\f', ['n'] = '\n',  ['r'] = '\r', ['t'] = '\t'};

static uint8_t *put_utf8(uint8_t *to, uint32_t c) {
    if (c >= 0x800 && c < 0x10000) { /* most that are escaped */
        to[0] = (uint8_t)(0xE0 | c >> 12);
        to[1] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
        to[2] = (uint8_t)(0x80 | (c & 0x3F));
        return to + 3;
    }
    uint32_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : 4;
    static const uint8_t FIRST[] = {0, 0, 0xC0, 0xE0, 0xF0};
    to[0] = (uint8_t)(FIRST[n] | c >> 6 * (n - 1));
    if (n > 1) to[n - 1] = (uint8_t)(0x80 | (c & 0x3F));
    if (n > 2) to[2] = (uint8_t)(0x80 | (c >> 6 & 0x3F)), to[1] = (uint8_t)(0x80 | (c >> 12 & 0x3F));
    return to + n;
}

/* Past \uXXXX, or a pair of them that makes one character, which is written; NULL: half of a pair, or not JSON. */
static Bytes decode_unicode(Bytes p, Bytes end, uint8_t **to) {
    int32_t c = end - p < 6 ? -1 : hex4(p + 2), low;
    if (c < 0 || (c >= 0xDC00 && c < 0xE000)) return NULL;
    p += 6;
    if (c >= 0xD800 && c < 0xE000) {
        if (end - p < 6 || p[0] != '\\' || p[1] != 'u' || (low = hex4(p + 2)) < 0xDC00 || low >= 0xE000) return NULL;
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
        p += 6;
    }
    *to = put_utf8(*to, (uint32_t)c);
    return p;
}

#ifdef BLOCK
typedef uint8_t Block __attribute__((vector_size(BLOCK)));

/* A bit for every byte, the first one lowest: its high bit. */
static inline unsigned bits_of(Block block) {
#ifdef __SSE2__
    return (unsigned)_mm_movemask_epi8((__m128i)block);
#else
    uint64_t words[2];
    memcpy(words, &block, BLOCK);
    if (!((words[0] | words[1]) & 0x8080808080808080u)) return 0;
    for (int i = 0; i < 2; i++) words[i] = (words[i] >> 7 & 0x0101010101010101u) * 0x0102040810204080u >> 56;
    return (unsigned)(words[0] | words[1] << 8);
#endif
}
#endif

/* Copy up to a quote, a backslash, a control character or what isn't ASCII. */
static inline Bytes copy_plain(Bytes p, Bytes end, uint8_t **out) {
    uint8_t *to = *out;
#ifdef BLOCK
    for (; end - p >= BLOCK; p += BLOCK, to += BLOCK) {
        Block block;
        unsigned bits;
        memcpy(&block, p, BLOCK);
        memcpy(to, &block, BLOCK);
        bits = bits_of((Block)((block == '"') | (block == '\\') | (block < 32)) | block);
        if (bits) {
            int n = __builtin_ctz(bits);
            *out = to + n;
            return p + n;
        }
    }
#endif
    while (*p >= 32 && *p < 128 && *p != '"' && *p != '\\') *to++ = *p++;
    *out = to;
    return p;
}

static int follows(uint8_t c) { return (c & 0xC0) == 0x80; }

/* The bytes of a character beyond ASCII; 0: it isn't UTF-8. Source: Unicode 15, 3.9, well-formed byte sequences. */
static int utf8_size(Bytes p) {
    if (*p < 0xC2 || *p > 0xF4 || !follows(p[1])) return 0;
    if (*p < 0xE0) return 2;
    if ((*p == 0xE0 && p[1] < 0xA0) || (*p == 0xED && p[1] > 0x9F) || !follows(p[2])) return 0;
    if (*p < 0xF0) return 3;
    return (*p == 0xF0 && p[1] < 0x90) || (*p == 0xF4 && p[1] > 0x8F) || !follows(p[3]) ? 0 : 4;
}

/* From behind the opening quote to behind the closing one, or NULL. The text without escapes is written at scan->to,
   wanted or not, and its end is given in *stop: one pass is cheaper than knowing first. */
static Bytes decode_string(Bytes p, Scan *scan, uint8_t **stop) {
    uint8_t *to = scan->to;
    for (;;) {
        p = copy_plain(p, scan->end, &to);
        if (*p == '"') {
            *stop = to;
            return p + 1;
        }
        if (*p < 32) return NULL;
        if (*p >= 128) {
            Bytes begin = p;
            for (int n; *p >= 128; p += n) {
#ifdef BLOCK
                uint32_t word, rest;
                for (; scan->end - p >= 4; p += 3) { /* three bytes, as most characters of Asia have */
                    memcpy(&word, p, 4);
                    rest = word & 0x200F; /* of 1110aaaa 10b.....: 0 is too long a form, 11011 half of a pair */
                    if ((word & 0xC0C0F0) != 0x8080E0 || !rest || rest == 0x200D) break;
                }
                if (*p < 128) break;
#endif
                if (!(n = utf8_size(p))) return NULL;
            }
            memcpy(to, begin, (size_t)(p - begin));
            to += p - begin;
        }
        while (*p == '\\') {
            if (p[1] == 'u') {
                if (!(p = decode_unicode(p, scan->end, &to))) return NULL;
            } else {
                if (!(*to++ = MEANING[p[1]])) return NULL;
                p += 2;
            }
        }
    }
}

/* -------------------------------------------------------------------------------------------------------- values */

static Bytes skip_space(Bytes p) {
    while (*p == ' ' || *p == '\t' || *p == '\r') p++;
    return p;
}

static Bytes skip_digits(Bytes p) {
    if (!is_digit(*p)) return NULL;
    while (is_digit(*p)) p++;
    return p;
}

static Bytes skip_number(Bytes p) {
    Bytes begin = p;
    p += *p == '-';
    p = *p == '0' ? p + 1 : skip_digits(p);
    if (p && *p == '.') p = skip_digits(p + 1);
    if (p && (*p | 32) == 'e') p = skip_digits(p + (p[1] == '+' || p[1] == '-' ? 2 : 1));
    return p && p - begin <= NUMBER ? p : NULL;
}

static Bytes skip_word(Bytes p, const char *word) {
    while (*word) if (*p++ != (uint8_t)*word++) return NULL;
    return p;
}

static Bytes skip_object(Bytes p, int depth, Scan *scan);

static Bytes skip_list(Bytes p, int depth, Scan *scan);

/* Past the value that p points at, which lies so many levels deep, or NULL. */
static Bytes skip_value(Bytes p, int depth, Scan *scan) {
    uint8_t *stop;
    switch (*p) {
        case '"': return decode_string(p + 1, scan, &stop);
        case '{': return depth < DEPTH ? skip_object(p + 1, depth + 1, scan) : NULL;
        case '[': return depth < DEPTH ? skip_list(p + 1, depth + 1, scan) : NULL;
        case 't': return skip_word(p, "true");
        case 'f': return skip_word(p, "false");
        case 'n': return skip_word(p, "null");
        default: return skip_number(p);
    }
}

static Bytes skip_list(Bytes p, int depth, Scan *scan) {
    p = skip_space(p);
    if (*p == ']') return p + 1;
    for (;; p++) {
        if (!(p = skip_value(skip_space(p), depth, scan))) return NULL;
        p = skip_space(p);
        if (*p == ']') return p + 1;
        if (*p != ',') return NULL;
    }
}

static Field *find(Scan *scan, Py_ssize_t size) {
    for (Field *field = scan->fields; field < scan->fields + scan->n; field++) {
        if (field->size == size && !memcmp(field->name, scan->to, (size_t)size)) return field;
    }
    return NULL;
}

/* Past a value that is wanted; of equal keys the last one wins. */
static Bytes take_value(Bytes p, int depth, Scan *scan, Field *field) {
    Bytes begin = p;
    uint8_t *stop;
    if (*p == '"') {
        if (!(p = decode_string(p + 1, scan, &stop))) return NULL;
    } else {
        if (!(p = skip_value(p, depth, scan))) return NULL;
        memcpy(scan->to, begin, (size_t)(p - begin));
        stop = scan->to + (p - begin);
    }
    field->kind = *begin == '"' ? STRING : OTHER;
    field->begin = scan->to - scan->arena;
    field->end = stop - scan->arena;
    scan->to = stop;
    return p;
}

static Bytes skip_object(Bytes p, int depth, Scan *scan) {
    p = skip_space(p);
    if (*p == '}') return p + 1;
    for (;; p++) {
        uint8_t *stop;
        p = skip_space(p);
        if (*p != '"' || !(p = decode_string(p + 1, scan, &stop))) return NULL;
        Field *field = depth == 1 ? find(scan, stop - scan->to) : NULL;
        p = skip_space(p);
        if (*p != ':') return NULL;
        p = skip_space(p + 1);
        p = field ? take_value(p, depth, scan, field) : skip_value(p, depth, scan);
        if (!p) return NULL;
        p = skip_space(p);
        if (*p == '}') return p + 1;
        if (*p != ',') return NULL;
    }
}

/* --------------------------------------------------------------------------------------------------------- lines */

static int is_blank(Bytes p, Bytes end) {
    while (p < end && (*p == ' ' || (*p >= '\t' && *p <= '\r'))) p++;
    return p == end;
}

typedef struct {
    Bytes buffer;
    int64_t at, end, limit, offset, line, *table, row, rows;
    uint8_t *arena;
    int64_t used;
} Job;

static void extract_lines(Job *job, Scan *scan) {
    Bytes p = job->buffer + job->at, end = job->buffer + job->end;
    while (end > p && end[-1] != '\n') end--; /* a last line without one is left to the twin */
    scan->end = end;
    scan->arena = job->arena;
    for (; p < end && job->row < job->rows; job->line++) {
        Bytes begin = p;
        if (*p <= ' ') {
            while (*p == ' ' || (*p >= '\t' && *p <= '\r' && *p != '\n')) p++;
            if (*p == '\n') { /* blank */
                p++;
                continue;
            }
            p = skip_space(begin); /* fewer bytes are blank in JSON */
        }
        scan->to = job->arena + job->used;
        for (Py_ssize_t i = 0; i < scan->n; i++) {
            scan->fields[i].kind = MISSING;
            scan->fields[i].begin = scan->fields[i].end = job->used;
        }
        p = *p == '{' ? skip_object(p + 1, 1, scan) : NULL;
        if (p) p = skip_space(p);
        if (!p || *p++ != '\n' || p - begin > job->limit) {
            p = begin;
            break;
        }
        job->used = scan->to - job->arena;
        int64_t *cell = job->table + job->row++ * (3 + 3 * scan->n);
        *cell++ = job->line;
        *cell++ = job->offset + (begin - job->buffer);
        *cell++ = p - begin;
        for (Field *field = scan->fields; field < scan->fields + scan->n; field++) {
            *cell++ = field->kind;
            *cell++ = field->begin;
            *cell++ = field->end;
        }
    }
    job->at = p - job->buffer;
}

static int apart(const Py_buffer *a, const Py_buffer *b) {
    uintptr_t x = (uintptr_t)a->buf, y = (uintptr_t)b->buf;
    return x + (uintptr_t)a->len <= y || y + (uintptr_t)b->len <= x;
}

static const char *check(const Job *job, const Py_buffer *buffer, const Py_buffer *table, const Py_buffer *arena,
                         Py_ssize_t n) {
    if (job->at < 0 || job->end < job->at || buffer->len < job->end) return "at and end lie outside the buffer";
    if (job->used < 0 || job->used > arena->len || arena->len - job->used < job->end - job->at) {
        return "the arena has less room than there is to read";
    }
    if (job->row < 0 || job->row > table->len / 8 / (3 + 3 * n)) return "the table has fewer rows";
    if (job->offset < 0 || job->line < 0 || job->offset > INT64_MAX / 2 || job->line > INT64_MAX / 2) {
        return "offset and line must not be negative";
    }
    if (!apart(buffer, arena) || !apart(buffer, table) || !apart(arena, table)) return "the buffers overlap";
    return NULL;
}

static Field *get_fields(PyObject *names, Py_ssize_t *n) {
    *n = PyTuple_Size(names);
    Field *fields = calloc((size_t)*n + 1, sizeof *fields);
    if (!fields) return (Field *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < *n; i++) {
        char *name;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(names, i), &name, &fields[i].size) < 0) {
            free(fields);
            return NULL;
        }
        fields[i].name = (Bytes)name;
    }
    return fields;
}

static PyObject *extract(PyObject *self, PyObject *args) {
    PyObject *o[4], *result = NULL;
    Py_buffer buffer = {0}, table = {0}, arena = {0};
    Job job = {0};
    Scan scan = {0};
    const char *wrong;
    (void)self;
    if (!PyArg_ParseTuple(args, "OLLO!LLLOLOL", &o[0], &job.at, &job.end, &PyTuple_Type, &o[1], &job.limit, &job.offset, &job.line,
                          &o[2], &job.row, &o[3], &job.used) ||
        !(scan.fields = get_fields(o[1], &scan.n))) {
        return NULL;
    }
    if (get_buffer(o[0], &buffer, "B", 0, "buffer") < 0 || get_buffer(o[2], &table, "q", 1, "table") < 0 ||
        get_buffer(o[3], &arena, "B", 1, "arena") < 0) {
        goto done;
    }
    if ((wrong = check(&job, &buffer, &table, &arena, scan.n))) {
        PyErr_SetString(PyExc_ValueError, wrong);
        goto done;
    }
    job.buffer = buffer.buf;
    job.table = table.buf;
    job.arena = arena.buf;
    job.rows = table.len / 8 / (3 + 3 * scan.n);
    Py_BEGIN_ALLOW_THREADS
    extract_lines(&job, &scan);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("LLLL", job.at, job.row, job.used, job.line);
done:
    free(scan.fields);
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&table);
    PyBuffer_Release(&arena);
    return result;
}

/* The lines that end in a block of a file; blank: what precedes it of the line it begins in is blank. */
static PyObject *index_lines(PyObject *self, PyObject *args) {
    PyObject *o[2], *result = NULL;
    Py_buffer buffer = {0}, table = {0};
    long long size, number, line, begin, offset;
    int blank;
    (void)self;
    if (!PyArg_ParseTuple(args, "OLLLLLpO", &o[0], &size, &number, &line, &offset, &begin, &blank, &o[1])) return NULL;
    if (get_buffer(o[0], &buffer, "B", 0, "buffer") < 0 || get_buffer(o[1], &table, "q", 1, "table") < 0) goto done;
    if (size < 0 || size > buffer.len || table.len / 24 < size || !apart(&buffer, &table) || line < 0 || offset < 0 ||
        line > INT64_MAX / 2 || offset > INT64_MAX / 2) {
        PyErr_SetString(PyExc_ValueError, "size, line or offset out of range, or a table of fewer rows than bytes");
        goto done;
    }
    int64_t *row = table.buf;
    Py_BEGIN_ALLOW_THREADS
    Bytes p = buffer.buf, end = p + size, stop;
    for (; p < end && (stop = memchr(p, '\n', (size_t)(end - p))); line++) {
        if (!blank || !is_blank(p, stop)) {
            *row++ = number;
            *row++ = line;
            *row++ = begin;
        }
        p = stop + 1;
        begin = offset + (p - (Bytes)buffer.buf);
        blank = 1;
    }
    blank = blank && is_blank(p, end);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("LLLO", (long long)((row - (int64_t *)table.buf) / 3), line, begin, blank ? Py_True : Py_False);
done:
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&table);
    return result;
}

PyMethodDef json_methods[] = {{"extract", extract, METH_VARARGS, NULL},
                              {"index_lines", index_lines, METH_VARARGS, NULL},
                              {NULL, NULL, 0, NULL}};
