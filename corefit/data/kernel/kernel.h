/* What the parts of the kernel share. Every function takes buffers that the caller owns, checks them, releases the
   GIL, and has a bit-identical twin in Python (pack.py, rows.py, jsonl.py), which says what it does. */
#ifndef COREFIT_KERNEL_H
#define COREFIT_KERNEL_H

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Get a C-contiguous buffer of `kinds` (struct codes: "i" int32, "q" int64, "B" uint8, "H" uint16), or set an error and
   give -1. Release it with PyBuffer_Release, also where nothing was got. */
int get_buffer(PyObject *object, Py_buffer *view, const char *kinds, int writable, const char *name);

/* The same for n of them; those from `writable` on are written to. Gives 0, and holds none, after an error. */
int get_buffers(int n, PyObject **objects, Py_buffer *views, const char **kinds, const char **names, int writable);
void release_buffers(int n, Py_buffer *views);

extern PyMethodDef pack_methods[], rows_methods[], json_methods[];
#endif
