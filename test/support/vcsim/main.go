// A vSphere for tests: govmomi's simulator on loopback, with TLS, in the model of one ESXi host or of a vCenter.
//
// It is started by test/support/vcsim.ts and does what its standard input says, a JSON object a line; each is answered by one.
// It ends with its standard input, so that it cannot outlive the test. What it says of its state it reads with
// govmomi's own client over SOAP, and not with the code that is tested.
//
// Beyond the simulator: what RegisterVM_Task has registered gets the UUID, the network interfaces and the disks of its .vmx, as with vSphere (the
// simulator makes up a UUID and reads nothing), and
// calls of the client that is tested are counted, held up and refused as the test says.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"html"
	"io"
	"io/ioutil"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	user     = "root"
	password = "secret & <word>"
)

type command struct {
	Do     string
	Method string
	Fault  string
	Ms     int
	Name   string
}

// What the calls of the client that is tested get besides being carried out.
type script struct {
	sync.Mutex
	calls  map[string]int
	faults map[string][]string
	delays map[string]int
	// Machines hear no request to shut down: they have no system.
	deaf bool
}

var faultsByName = map[string]types.BaseMethodFault{
	"NoPermission":                     &types.NoPermission{PrivilegeId: "VirtualMachine.Inventory.Register"},
	"RestrictedVersion":                &types.RestrictedVersion{},
	"FileFault":                        &types.FileFault{File: "[offshoot] a/a.vmx"},
	"InsufficientMemoryResourcesFault": &types.InsufficientMemoryResourcesFault{},
	"ToolsUnavailable":                 &types.ToolsUnavailable{},
}

const agent = "offshoot"

var (
	methodOf = regexp.MustCompile(`<soapenv:Body><(\w+)`)
	objectOf = regexp.MustCompile(`<_this type="(\w+)">([^<]+)</_this>`)
	pathOf   = regexp.MustCompile(`<path>([^<]+)</path>`)
	nameOf   = regexp.MustCompile(`<name>([^<]+)</name>`)
	taskOf   = regexp.MustCompile(`<returnval type="Task">([^<]+)</returnval>`)
	// Network interfaces and disks of a .vmx, and where the descriptor of a disk leads.
	macLine    = regexp.MustCompile(`(?m)^\s*ethernet(\d+)\.address\s*=\s*"([^"]*)"`)
	diskLine   = regexp.MustCompile(`(?m)^\s*(?:scsi|sata|ide|nvme)\d+:\d+\.fileName\s*=\s*"([^"]*\.vmdk)"`)
	extentLine = regexp.MustCompile(`(?m)^RW (\d+) VMFS "([^"/]+)"`)
	uuidLine   = regexp.MustCompile(`(?m)^\s*uuid\.bios\s*=\s*"([^"]*)"`)
)

// take counts a call, holds it up, and says which fault it gets.
func (s *script) take(method string) string {
	s.Lock()
	s.calls[method]++
	delay := s.delays[method]
	fault := ""
	if names := s.faults[method]; len(names) > 0 {
		fault, s.faults[method] = names[0], names[1:]
	}
	s.Unlock()
	time.Sleep(time.Duration(delay) * time.Millisecond)
	return fault
}

func (s *script) isDeaf() bool {
	s.Lock()
	defer s.Unlock()
	return s.deaf
}

// handler is the simulator with the script before it.
func (s *script) handler(unlocked http.Handler) http.Handler {
	// One call at a time: this version looks through folders without their locks, and panics when a machine is just being made.
	var one sync.Mutex
	simulated := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		one.Lock()
		defer one.Unlock()
		unlocked.ServeHTTP(w, r)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.UserAgent() != agent {
			simulated.ServeHTTP(w, r)
			return
		}
		body, _ := ioutil.ReadAll(r.Body)
		method := first(methodOf, body)
		fault := s.take(method)
		r.Body = ioutil.NopCloser(bytes.NewReader(body))
		switch {
		case fault != "" && method == "RegisterVM_Task":
			// The call is accepted, and its task fails.
			this := objectOf.FindSubmatch(body)
			object := simulator.Map.Get(types.ManagedObjectReference{Type: string(this[1]), Value: string(this[2])})
			task := simulator.CreateTask(object, "registerVm", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) { return nil, faultsByName[fault] })
			write(w, http.StatusOK, fmt.Sprintf(`<%sResponse xmlns="urn:vim25"><returnval type="Task">%s</returnval></%sResponse>`, method, task.Run().Value, method))
		case fault != "":
			write(w, http.StatusInternalServerError, fmt.Sprintf(`<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>refused by the test</faultstring>`+
				`<detail><%sFault xmlns="urn:vim25" xsi:type="%s"/></detail></soapenv:Fault>`, fault, fault))
		case method == "ShutdownGuest" && s.isDeaf():
			write(w, http.StatusOK, `<ShutdownGuestResponse xmlns="urn:vim25"/>`)
		case method == "RefreshDatastore":
			// This version of the simulator forgets its answer.
			answer := httptest.NewRecorder()
			simulated.ServeHTTP(answer, r)
			if bytes.Contains(answer.Body.Bytes(), []byte("Fault>")) {
				w.WriteHeader(answer.Code)
				_, _ = w.Write(answer.Body.Bytes())
				return
			}
			write(w, http.StatusOK, `<RefreshDatastoreResponse xmlns="urn:vim25"/>`)
		case method == "RegisterVM_Task":
			makeAnew(html.UnescapeString(first(pathOf, body)), html.UnescapeString(first(nameOf, body)))
			answer := httptest.NewRecorder()
			simulated.ServeHTTP(answer, r)
			readConfiguration(first(taskOf, answer.Body.Bytes()), html.UnescapeString(first(pathOf, body)))
			w.WriteHeader(answer.Code)
			_, _ = w.Write(answer.Body.Bytes())
		default:
			simulated.ServeHTTP(w, r)
		}
	})
}

func first(pattern *regexp.Regexp, text []byte) string {
	if match := pattern.FindSubmatch(text); match != nil {
		return string(match[1])
	}
	return ""
}

func write(w http.ResponseWriter, status int, body string) {
	w.WriteHeader(status)
	_, _ = io.WriteString(w, `<?xml version="1.0"?><soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" `+
		`xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>`+body+`</soapenv:Body></soapenv:Envelope>`)
}

func fileOf(vmx string) string {
	var path object.DatastorePath
	path.FromString(vmx)
	return filepath.Join(path.Datastore, path.Path)
}

// makeAnew makes the files beside a .vmx that vSphere makes when they are not there; the simulator registers nothing without them.
func makeAnew(vmx string, name string) {
	file := fileOf(vmx)
	if _, err := os.Stat(file); err != nil {
		return
	}
	for _, other := range []string{name + ".nvram", "vmware.log"} {
		made, err := os.OpenFile(filepath.Join(filepath.Dir(file), other), os.O_CREATE, 0600)
		if err != nil {
			log.Fatal(err)
		}
		_ = made.Close()
	}
}

// readConfiguration gives the machine that a task has registered the UUID of its .vmx. Datastores are directories here.
func readConfiguration(task string, vmx string) {
	made, ok := simulator.Map.Get(types.ManagedObjectReference{Type: "Task", Value: task}).(*simulator.Task)
	if !ok {
		return
	}
	ref, ok := made.Info.Result.(types.ManagedObjectReference)
	if !ok {
		return
	}
	text, err := ioutil.ReadFile(fileOf(vmx))
	if err != nil {
		return
	}
	digits := strings.NewReplacer(" ", "", "-", "").Replace(strings.ToLower(first(uuidLine, text)))
	if len(digits) != 32 {
		return
	}
	vm := simulator.Map.Get(ref).(*simulator.VirtualMachine)
	simulator.Map.WithLock(vm, func() {
		vm.Config.Uuid = digits[:8] + "-" + digits[8:12] + "-" + digits[12:16] + "-" + digits[16:20] + "-" + digits[20:]
		vm.Summary.Config.Uuid = vm.Config.Uuid
		nics := macLine.FindAllSubmatch(text, -1)
		sort.Slice(nics, func(a, b int) bool { return string(nics[a][1]) < string(nics[b][1]) })
		for i, match := range nics {
			nic := &types.VirtualVmxnet3{}
			nic.Key = int32(4000 + i)
			nic.AddressType = "manual"
			nic.MacAddress = string(match[2])
			vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, nic)
		}
		for i, match := range diskLine.FindAllSubmatch(text, -1) {
			disk := &types.VirtualDisk{CapacityInBytes: capacityOf(vmx, string(match[1]))}
			disk.Key = int32(2000 + i)
			disk.Backing = &types.VirtualDiskFlatVer2BackingInfo{VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: string(match[1])}}
			vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, disk)
		}
	})
}

// capacityOf is the size of a disk by its descriptor, or -1 when a host could not open it: a name that is not found from the directory of
// the .vmx in the datastore, no descriptor, or one without all of its flat file beside it.
func capacityOf(vmx string, name string) int64 {
	if filepath.IsAbs(name) {
		return -1
	}
	file := filepath.Join(filepath.Dir(fileOf(vmx)), name)
	text, err := ioutil.ReadFile(file)
	if err != nil {
		return -1
	}
	match := extentLine.FindSubmatch(text)
	if match == nil {
		return -1
	}
	sectors, err := strconv.ParseInt(string(match[1]), 10, 64)
	if err != nil {
		return -1
	}
	flat, err := os.Stat(filepath.Join(filepath.Dir(file), string(match[2])))
	if err != nil || flat.Size() < sectors*512 {
		return -1
	}
	return sectors * 512
}

func main() {
	kind := flag.String("model", "esx", "esx or vpx")
	flag.Parse()
	model := simulator.ESX()
	if *kind == "vpx" {
		model = simulator.VPX()
	}
	model.Machine = 0
	defer model.Remove()
	if err := model.Create(); err != nil {
		log.Fatal(err)
	}
	model.Service.TLS = new(tls.Config)
	// The simulator compares the password with this one.
	model.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword(user, password)}
	server := model.Service.NewServer()
	defer server.Close()
	rules := &script{calls: map[string]int{}, faults: map[string][]string{}, delays: map[string]int{}}
	server.Config.Handler = rules.handler(server.Config.Handler)

	ctx := context.Background()
	client, err := govmomi.NewClient(ctx, server.URL, true)
	if err != nil {
		log.Fatal(err)
	}
	leaf := sha256.Sum256(server.TLS.Certificates[0].Certificate[0])
	answer := json.NewEncoder(os.Stdout)
	_ = answer.Encode(map[string]interface{}{"host": server.URL.Hostname(), "port": server.URL.Port(), "thumbprint": hex.EncodeToString(leaf[:])})

	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var asked command
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			log.Fatal(err)
		}
		_ = answer.Encode(do(ctx, client, rules, asked))
	}
}

func do(ctx context.Context, client *govmomi.Client, rules *script, asked command) interface{} {
	switch asked.Do {
	case "machines":
		var found []mo.VirtualMachine
		list(ctx, client, "VirtualMachine", []string{"name", "config", "runtime", "parent", "resourcePool"}, &found)
		machines := []map[string]interface{}{}
		for _, vm := range found {
			macs, disks := []string{}, []map[string]interface{}{}
			for _, device := range vm.Config.Hardware.Device {
				switch each := device.(type) {
				case *types.VirtualVmxnet3:
					macs = append(macs, each.MacAddress)
				case *types.VirtualDisk:
					if backing, ok := each.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
						disks = append(disks, map[string]interface{}{"file": backing.FileName, "bytes": each.CapacityInBytes})
					}
				}
			}
			machines = append(machines, map[string]interface{}{
				"id": vm.Self.Value, "name": vm.Name, "uuid": vm.Config.Uuid, "path": vm.Config.Files.VmPathName, "power": vm.Runtime.PowerState,
				"macs": macs, "disks": disks, "folder": vm.Parent.Value, "pool": vm.ResourcePool.Value,
			})
		}
		return machines
	case "datastores":
		var found []mo.Datastore
		list(ctx, client, "Datastore", []string{"name", "info", "host"}, &found)
		datastores := []map[string]interface{}{}
		for _, each := range found {
			if nas, ok := each.Info.(*types.NasDatastoreInfo); ok {
				datastores = append(datastores, map[string]interface{}{"name": each.Name, "server": nas.Nas.RemoteHost, "path": nas.Nas.RemotePath, "type": nas.Nas.Type, "hosts": len(each.Host)})
			}
		}
		return datastores
	case "sessions", "expire":
		var manager mo.SessionManager
		if err := property.DefaultCollector(client.Client).RetrieveOne(ctx, *client.ServiceContent.SessionManager, []string{"sessionList", "currentSession"}, &manager); err != nil {
			log.Fatal(err)
		}
		others := []string{}
		for _, session := range manager.SessionList {
			if session.Key != manager.CurrentSession.Key {
				others = append(others, session.Key)
			}
		}
		if asked.Do == "expire" && len(others) > 0 {
			if err := client.SessionManager.TerminateSession(ctx, others); err != nil {
				log.Fatal(err)
			}
		}
		return len(others)
	case "tools":
		for _, entity := range simulator.Map.All("VirtualMachine") {
			vm := entity.(*simulator.VirtualMachine)
			vm.Guest.ToolsRunningStatus = string(types.VirtualMachineToolsRunningStatusGuestToolsRunning)
		}
		return true
	}
	rules.Lock()
	defer rules.Unlock()
	switch asked.Do {
	case "calls":
		return rules.calls[asked.Method]
	case "fault":
		if faultsByName[asked.Fault] == nil {
			log.Fatalf("there is no fault %s", asked.Fault)
		}
		rules.faults[asked.Method] = append(rules.faults[asked.Method], asked.Fault)
		return true
	case "forgive":
		rules.faults = map[string][]string{}
		return true
	case "deafen":
		rules.deaf = true
		return true
	case "delay":
		rules.delays[asked.Method] = asked.Ms
		return true
	}
	log.Fatalf("%s is not known here", asked.Do)
	return nil
}

func list(ctx context.Context, client *govmomi.Client, kind string, properties []string, into interface{}) {
	all, err := view.NewManager(client.Client).CreateContainerView(ctx, client.ServiceContent.RootFolder, []string{kind}, true)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = all.Destroy(ctx) }()
	if err := all.Retrieve(ctx, []string{kind}, properties, into); err != nil {
		log.Fatal(err)
	}
}
