#include "kernel.h"

PyMethodDef pack_methods[] = {{NULL, NULL, 0, NULL}};
