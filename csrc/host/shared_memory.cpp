// See shared_memory.h.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace {

constexpr size_t kHuge = 8u << 20;  // bytes from which on the kernel is asked for huge pages

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

size_t whole_pages(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return std::max<size_t>(1, (bytes + page - 1) / page) * page;
}

}  // namespace

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes), mapped_(whole_pages(bytes)) {
    descriptor_ = memfd_create("advgame-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor_ < 0) fail("memfd_create");
    try {
        if (ftruncate(descriptor_, (off_t)mapped_) != 0) fail("a shared file of " + std::to_string(bytes) + " bytes");
        // a side that shortened the file would end the other one with a bus error
        if (fcntl(descriptor_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("sealing a shared file");
        map(descriptor_);
    } catch (...) {
        close_file();
        throw;
    }
}

SharedMemory::SharedMemory(const std::string& path, size_t bytes) : bytes_(bytes), mapped_(whole_pages(bytes)) {
    const int descriptor = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor < 0) fail(path);
    try {
        struct stat found;
        if (fstat(descriptor, &found) != 0) fail(path);
        if ((size_t)found.st_size < bytes)
            throw std::invalid_argument("the shared file has " + std::to_string(found.st_size) + " bytes, the plan needs " +
                                        std::to_string(bytes));
        map(descriptor);
    } catch (...) {
        close(descriptor);
        throw;
    }
    close(descriptor);
}

SharedMemory::~SharedMemory() {
    if (data_) munmap(data_, mapped_);
    close_file();
}

void SharedMemory::close_file() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
}

void SharedMemory::map(int descriptor) {
    void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (found == MAP_FAILED) fail("mapping " + std::to_string(bytes_) + " bytes");
    data_ = found;
    // a hint: fewer entries of page tables for those who write and read all of it
    if (mapped_ >= kHuge) madvise(data_, mapped_, MADV_HUGEPAGE);
}
