#include "kernel.h"

/* numpy writes int64 as "l" and int32 as "i" on Unix, as "q" and "l" on Windows: the size decides what "l" is. */
static char kind_of(const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    if (*format == '<' || *format == '=' || *format == '@') format++;
    if (format[0] == 0 || format[1] != 0) return 0;
    if (*format == 'l') return view->itemsize == 8 ? 'q' : 'i';
    return *format;
}

int get_buffer(PyObject *object, Py_buffer *view, const char *kinds, int writable, const char *name) {
    memset(view, 0, sizeof *view);
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0) {
        return -1;
    }
    char kind = kind_of(view);
    if (kind && strchr(kinds, kind)) return 0;
    PyErr_Format(PyExc_TypeError, "%s: elements of type '%s', expected one of '%s'", name,
                 view->format ? view->format : "B", kinds);
    PyBuffer_Release(view);
    return -1;
}

void release_buffers(int n, Py_buffer *views) {
    while (n--) PyBuffer_Release(&views[n]);
}

int get_buffers(int n, PyObject **objects, Py_buffer *views, const char **kinds, const char **names, int writable) {
    for (int i = 0; i < n; i++) {
        if (get_buffer(objects[i], &views[i], kinds[i], i >= writable, names[i]) == 0) continue;
        release_buffers(i, views);
        return 0;
    }
    return 1;
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", "corefit's C kernel; see kernel.h", 0, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddFunctions(module, pack_methods) < 0 || PyModule_AddFunctions(module, rows_methods) < 0 ||
                   PyModule_AddFunctions(module, json_methods) < 0)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
