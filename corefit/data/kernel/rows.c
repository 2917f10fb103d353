#include "kernel.h"

PyMethodDef rows_methods[] = {{NULL, NULL, 0, NULL}};
