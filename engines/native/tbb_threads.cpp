// Runs a layer's tasks on the workers of oneTBB. OpenVINO's wheels bring libtbb.so.12 and keep its
// workers spinning between operators: a second pool beside them would compete for the cores. This
// library only names that soname, so the loader binds it to the copy that OpenVINO has loaded.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "layer.h"

namespace {

int concurrency() { return tbb::this_task_arena::max_concurrency(); }

void run(int tasks, void (*task)(void* context, int index), void* context) {
    tbb::parallel_for(
        tbb::blocked_range<int>(0, tasks, 1),
        [=](const tbb::blocked_range<int>& range) {
            for (int i = range.begin(); i != range.end(); ++i) task(context, i);
        },
        tbb::simple_partitioner{});
}

}  // namespace

extern "C" const LpvitThreads lpvit_tbb_threads;
const LpvitThreads lpvit_tbb_threads = {concurrency, run};

extern "C" int32_t lpvit_interface() { return LPVIT_INTERFACE; }
