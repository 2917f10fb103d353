#include "kernel.h"

PyMethodDef json_methods[] = {{NULL, NULL, 0, NULL}};
