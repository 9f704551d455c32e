// Calls that follow each other without going back to Python, whose work between two small products takes longer than they do.
#include <cstdint>

struct Call {
    void (*function)(const void*);  // of any of the libraries
    const void* job;
};

extern "C" void run(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; ++i) calls[i].function(calls[i].job);
}
