// Threads that help with a call, and wait in here between calls.
//
// A call hands itself over once; whoever comes takes pieces of it until there are none left. The caller works too, and waits only
// for helpers that have begun: one that is still asleep, or kept from its core by another program, holds up nothing.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
inline void relax() { __builtin_ia32_pause(); }
#else
inline void relax() {}
#endif

class Crew {
  public:
    // Has work() called here and in up to threads - 1 helpers at once; returns when all calls have.
    template <class F>
    void run(int64_t threads, const F& work) {
        if (threads <= 1) return work();
        Job job{[](const void* w) { (*static_cast<const F*>(w))(); }, &work, threads - 1};
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            hire(threads - 1);
            jobs_.push_back(&job);
            posted_.fetch_add(1, std::memory_order_release);
        }
        if (threads == 2) wake_.notify_one();
        else wake_.notify_all();
        work();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        }
        for (int i = 0; i < SPINS && job.inside.load(std::memory_order_acquire); ++i) relax();
        if (!job.inside.load(std::memory_order_acquire)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        left_.wait(lock, [&] { return !job.inside.load(std::memory_order_acquire); });
    }

    // The process's crew. It is never destroyed: helpers may be asleep in it when the process ends.
    static Crew& ours() {
        static Crew* const crew = [] {
            Crew* made = new Crew;
            kept() = made;
            // A forked child has none of the threads, and perhaps a mutex that nobody will unlock.
            pthread_atfork(nullptr, nullptr, [] { new (kept()) Crew; });
            return made;
        }();
        return *crew;
    }

  private:
    // Of a wait that a core spends before it sleeps, some 20 microseconds: about what waking up takes. Longer, and other threads of
    // the process miss the core.
    static constexpr int SPINS = 500;

    struct Job {
        void (*call)(const void*);
        const void* work;
        int64_t seats;
        std::atomic<int64_t> inside{0};
    };

    static Crew*& kept() {
        static Crew* crew;
        return crew;
    }

    // Fewer than asked for where the system gives no more threads: the caller does what nobody helps with.
    void hire(int64_t helpers) {
        try {
            for (; helpers_ < helpers; ++helpers_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void help() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            const auto found = std::find_if(jobs_.begin(), jobs_.end(), [](Job* job) { return job->seats > 0; });
            if (found == jobs_.end()) {
                const uint64_t seen = posted_.load(std::memory_order_relaxed);
                lock.unlock();
                for (int i = 0; i < SPINS && posted_.load(std::memory_order_acquire) == seen; ++i) relax();
                lock.lock();
                wake_.wait(lock, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
                continue;
            }
            Job* const job = *found;
            --job->seats;
            job->inside.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job->call(job->work);
            lock.lock();
            // With the last one out the job may be gone: this is the last that is done with it.
            if (job->inside.fetch_sub(1, std::memory_order_release) == 1) left_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, left_;
    std::vector<Job*> jobs_;
    int64_t helpers_ = 0;
    std::atomic<uint64_t> posted_{0};
};

// Pieces of [0, total) for whoever asks; every thread of a call shares one.
class Pieces {
  public:
    Pieces(int64_t total, int64_t size) : total_(total), size_(size) {}

    // Calls f(start, stop) until all pieces are taken.
    template <class F>
    void take(F f) {
        for (int64_t start; (start = next_.fetch_add(size_, std::memory_order_relaxed)) < total_;) {
            const int64_t stop = std::min(start + size_, total_);
            f(start, stop);
            done_.fetch_add(stop - start, std::memory_order_release);
        }
    }

    // Until all pieces that others took are done.
    void wait() const {
        for (int i = 0; done_.load(std::memory_order_acquire) < total_; ++i)
            if (i < 1000) relax();
            else std::this_thread::yield();
    }

  private:
    const int64_t total_, size_;
    std::atomic<int64_t> next_{0}, done_{0};
};
