// A server and a client made of Go's own net/http, for tests of what Go's programs see through the mesh: `web serve NAME`
// and `web ask URL PROTOCOL METHODS WORKERS REQUESTS RATE`.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// How long a server lets requests finish, and a client waits for an answer.
const patience = 10 * time.Second

func main() {
	log.SetFlags(0)
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		serve(os.Args[2])
	case len(os.Args) == 8 && os.Args[1] == "ask":
		methods, workers, requests, rate := strings.Split(os.Args[4], ","), os.Args[5], os.Args[6], os.Args[7]
		ask(os.Args[2], os.Args[3], methods, number(workers), number(requests), number(rate))
	default:
		log.Fatal("usage: web serve NAME | web ask URL http1|http2 METHOD,METHOD... WORKERS REQUESTS RATE")
	}
}

// Both protocols without TLS, named.
func protocols(http1, http2 bool) *http.Protocols {
	var spoken http.Protocols
	spoken.SetHTTP1(http1)
	spoken.SetUnencryptedHTTP2(http2)
	return &spoken
}

// Serves on port 8080 until SIGTERM, which lets what is underway end.
func serve(name string) {
	var answered atomic.Int64
	handler := http.NewServeMux()
	handler.HandleFunc("/name", func(to http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(request.Body)
		if err != nil {
			log.Printf("reading a body: %v", err)
			return
		}
		answered.Add(1)
		fmt.Fprintf(to, "%s %s %s %s", name, request.Method, request.Proto, body)
	})
	// Tells what arrived: protocol, whether it was chunked, length and SHA-256.
	handler.HandleFunc("/upload", func(to http.ResponseWriter, request *http.Request) {
		sum := sha256.New()
		length, err := io.Copy(sum, request.Body)
		if err != nil {
			log.Printf("reading an upload: %v", err)
			return
		}
		chunked := strings.Join(request.TransferEncoding, ",")
		fmt.Fprintf(to, "%s [%s] %d %x", request.Proto, chunked, length, sum.Sum(nil))
	})
	alphabet := []byte("abcdefghijklmnopqrstuvwxyz")
	handler.HandleFunc("/file", func(to http.ResponseWriter, request *http.Request) {
		http.ServeContent(to, request, "file.txt", time.Time{}, bytes.NewReader(alphabet))
	})
	pages(handler)
	server := &http.Server{Handler: handler, Protocols: protocols(true, true)}
	ended := make(chan struct{})
	go func() {
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, syscall.SIGTERM)
		<-asked
		deadline, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := server.Shutdown(deadline); err != nil {
			log.Fatalf("shutting down: %v", err)
		}
		close(ended)
	}()
	listener, err := net.Listen("tcp", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	log.Print("ready")
	if err := server.Serve(listener); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-ended
	log.Printf("answered %d", answered.Load())
}

// Sends that many requests in all, from that many at once, with these methods in turn, and no more than `rate` a second unless
// that is 0. Bodies cannot be read again, so that none is sent twice unseen. Ends before when told so by SIGTERM. Fails unless
// each is answered with what was asked.
func ask(url, protocol string, methods []string, workers, requests, rate int) {
	http2 := protocol == "http2"
	client := &http.Client{
		Timeout: patience,
		Transport: &http.Transport{
			Protocols:           protocols(!http2, http2),
			MaxIdleConnsPerHost: workers,
		},
	}
	proto := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]
	enough, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	var turn <-chan time.Time
	if rate > 0 {
		ticker := time.NewTicker(time.Second / time.Duration(rate))
		defer ticker.Stop()
		turn = ticker.C
	}
	var next, succeeded, failed atomic.Int64
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for number := next.Add(1); number <= int64(requests) && enough.Err() == nil; number = next.Add(1) {
				if rate > 0 {
					<-turn
				}
				if err := once(client, url, methods[number%int64(len(methods))], proto, number); err != nil {
					failed.Add(1)
					log.Printf("request %d: %v", number, err)
					continue
				}
				succeeded.Add(1)
			}
		})
	}
	working.Wait()
	log.Printf("succeeded %d failed %d", succeeded.Load(), failed.Load())
	if failed.Load() > 0 {
		os.Exit(1)
	}
}

// Sends one request, and reads all of its answer.
func once(client *http.Client, url, method, proto string, number int64) error {
	body := ""
	if method == http.MethodPost {
		body = fmt.Sprintf("body-%d", number)
	}
	request, err := http.NewRequest(method, url, io.NopCloser(strings.NewReader(body)))
	if err != nil {
		return err
	}
	request.ContentLength = int64(len(body))
	if body == "" {
		request.Body = http.NoBody
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(said), " ")
	if answer.StatusCode != http.StatusOK || answer.Proto != proto ||
		rest != fmt.Sprintf("%s %s %s", method, proto, body) {
		return fmt.Errorf("%s %s: %q", answer.Status, answer.Proto, said)
	}
	return nil
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		log.Fatal(err)
	}
	return value
}
