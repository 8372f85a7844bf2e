// Symbols that one keye_ops library offers to the other; everything else is hidden.
#pragma once

#define KEYE_API __attribute__((visibility("default")))
