// Command franz-go-client is what the end-to-end tests drive: a Go client among the others, and the
// verified producer and reader of the fault tests.
//
// Every record says which producer, partition and sequence it is, and its filling follows from
// those, so a reader can tell lost, duplicated, reordered, changed and invented records apart. A
// record that got no ack may be there once or not at all; anything else is a broken promise and
// ends in a non-zero exit code.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

type command struct {
	name string
	what string
	run  func(ctx context.Context, args []string) error
}

var commands = []command{
	{"roundtrip", "produce with every codec and read it back", roundtrip},
	{"read", "read topics that other clients filled, and check them", read},
	{"produce", "produce verified records, and write down which were acknowledged", produce},
	{"verify", "read everything back and compare with what was acknowledged", verify},
	{"probe", "write one record after the other, and print when each was acknowledged", probe},
	{"group", "consume in a group with commits, printing each record, until told to leave", group},
	{"hold", "be a member of a group, commit given offsets, and stand still until told to leave", hold},
	{"checker", "the workload of the consistency checker, told by standard input what comes next", runChecker},
	{"versions", "call every API in every advertised version, and check the answers", versions},
	{"version", "print the version", version},
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	for _, c := range commands {
		if c.name == os.Args[1] {
			if err := c.run(context.Background(), os.Args[2:]); err != nil {
				fmt.Fprintf(os.Stderr, "franz-go-client %s: %v\n", c.name, err)
				os.Exit(1)
			}
			return
		}
	}
	usage()
}

func usage() {
	for _, c := range commands {
		fmt.Fprintf(os.Stderr, "franz-go-client %-10s %s\n", c.name, c.what)
	}
	os.Exit(64)
}

func version(context.Context, []string) error {
	fmt.Println("franz-go client of the Chronik tests")
	return nil
}

// common are the flags of every command that talks to a cluster.
type common struct {
	flags   *flag.FlagSet
	brokers string
	topic   string
	timeout time.Duration
}

func newCommon(name string) *common {
	c := &common{flags: flag.NewFlagSet(name, flag.ExitOnError)}
	c.flags.StringVar(&c.brokers, "brokers", "127.0.0.1:9092", "bootstrap addresses, with commas")
	c.flags.StringVar(&c.topic, "topic", "", "topic, or topics with commas where a command takes several")
	c.flags.DurationVar(&c.timeout, "timeout", 2*time.Minute, "for the whole command")
	return c
}

func (c *common) client(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{
		kgo.SeedBrokers(strings.Split(c.brokers, ",")...),
		// Tests kill servers: look again soon, and do not wait long between attempts.
		kgo.MetadataMinAge(10 * time.Millisecond),
		kgo.RetryBackoffFn(func(int) time.Duration { return 20 * time.Millisecond }),
		kgo.DialTimeout(2 * time.Second),
		kgo.RecordPartitioner(kgo.ManualPartitioner()),
		kgo.FetchMaxWait(500 * time.Millisecond),
	}, opts...)...)
}
